"""LoRA, textual inversion and IP-Adapter under a guard give what they give in stock."""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

import fastguard
from fastguard.pipelines.outputs import select_branch
from tests import pipelines
from tests.adapters import ip_adapter_state
from tests.guarded import STEPS, call, picture, same


def test_lora():
    from peft import LoraConfig

    pipe = pipelines.sd()
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    same(pipe)
    same(pipe, cross_attention_kwargs={"scale": 0.3})
    stock = call(pipe)
    with fastguard.enable(pipe, "cfg"):
        pipe.unet.disable_adapters()
        without = call(pipe)
        pipe.unet.enable_adapters()
        with_adapter = call(pipe)
    assert (without - stock).abs().max() > 1e-3 * stock.abs().max()
    torch.testing.assert_close(with_adapter, stock, rtol=0, atol=1e-4 * stock.abs().max().item())


def test_textual_inversion():
    pipe = pipelines.sd(tokenizer=copy.deepcopy(pipelines.tokenizer()))
    embedding = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with fastguard.enable(pipe, "cfg"):
        plain = call(pipe, prompt="a <mine> cat")
        pipe.load_textual_inversion({"<mine>": embedding})
        assert not torch.equal(call(pipe, prompt="a <mine> cat"), plain)
    same(pipe, prompt="a <mine> cat")


def test_ip_adapter():
    encoder, processor = pipelines.image_encoder()
    pipe = pipelines.sd(image_encoder=encoder, feature_extractor=processor)
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    embeds = [torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2))]
    same(pipe, ip_adapter_image_embeds=embeds)
    pipe.set_ip_adapter_scale(0.4)
    same(pipe, ip_adapter_image=[[picture(), picture(seed=1)]])
    with fastguard.enable(pipe, "stp", t_star=0) as guard:  # one branch only: its half of the image embeddings
        call(pipe, ip_adapter_image_embeds=embeds)
        assert guard.report[0].denoiser_rows == STEPS


def test_one_branch_of_several_images_has_its_own_embeddings():
    """As documented for one prompt, [2, images, D] of two become two rows an image, which attention folds together."""
    pipe = pipelines.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    embeds = {"ip_adapter_image_embeds": [torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2))]}
    with fastguard.enable(pipe, "stp", t_star=0):
        one = call(pipe, **embeds)
    with fastguard.enable(pipe, "stp", t_star=0, monitor=True) as guard:
        both = call(pipe, **embeds)
        assert guard.report[0].denoiser_rows == 2 * STEPS
    torch.testing.assert_close(one, both, rtol=0, atol=1e-5 * both.abs().max().item())


def test_branches_of_named_tuples():
    pair = namedtuple("Pair", "u c")
    half = select_branch({"p": pair(torch.arange(4), [torch.arange(4), 3])}, "cond", 2)["p"]
    assert (
        type(half).__name__ == "Pair" and half.u.tolist() == [2, 3] and half.c[0].tolist() == [2, 3] and half.c[1] == 3
    )


class Residuals(list):
    """As hooks and custom ControlNets may hand them over; torch's pytree takes it for a leaf."""


@pytest.mark.parametrize("kind", [Residuals, UserDict, FrozenDict])
def test_branches_of_containers_of_any_kind(kind):
    held = kind([torch.arange(4)]) if kind is Residuals else kind({"a": torch.arange(4)})
    half = select_branch(((held,), {}), "uncond", 2)[0][0]
    assert (half[0] if kind is Residuals else half["a"]).tolist() == [0, 1]


def test_masks_of_ip_adapters_belong_to_no_branch():
    """Two adapters for one image: as many masks as rows of a batch, and yet no halves of one."""
    encoder, processor = pipelines.image_encoder()
    pipe = pipelines.sd(image_encoder=encoder, feature_extractor=processor)
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)] * 2)
    pipe.set_ip_adapter_scale([0.7, 0.7])
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :, :16] = masks[1, :, :, 16:] = 1
    arguments = {
        "prompt": "a cat",
        "ip_adapter_image_embeds": [torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(2))] * 2,
        "cross_attention_kwargs": {"ip_adapter_masks": masks},
    }
    same(pipe, **arguments)
    with fastguard.enable(pipe, "stp", gate=None) as guard:
        call(pipe, **arguments)
        assert guard.report[0].denoiser_rows < 2 * STEPS
