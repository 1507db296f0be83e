"""Tiny instances of Bria's pipelines."""

from __future__ import annotations

import json
import zlib
from typing import Any

import diffusers
import torch

from tests import pipelines
from tests.families.more import GUIDED, image_vae, picture, wan_vae
from tests.families.tiny import SQUARE, Tiny, embeds, euler, parts, seeded


def words(prompts: list[str], *shape: int) -> torch.Tensor:
    """What a text encoder would give for each prompt: random numbers that depend on it alone."""
    return torch.stack([embeds(zlib.crc32(prompt.encode()), found=shape)["found"] for prompt in prompts])


def two_prompts(seed: int) -> dict[str, Any]:
    return {"prompt": [f"{seed} a", f"{seed} b"]}


def bria() -> Any:
    transformer = seeded(
        lambda: diffusers.BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 4, 8],
        )
    )
    return parts(diffusers.BriaPipeline, transformer=transformer, scheduler=euler(), vae=image_vae())


def fibo(name: str = "BriaFiboPipeline", **extra: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.BriaFiboTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 4, 8],
            text_encoder_dim=16,
        )
    )
    pipe = parts(
        getattr(diffusers, name),
        transformer=transformer,
        scheduler=euler(),
        text_encoder=pipelines.text_encoder(),  # asked for its dtype
        **extra,
    )

    def get_prompt_embeds(prompt: list[str], **_: Any) -> Any:
        length = 5 + int(prompt[0].count("2"))  # the branches differ in length, and the shorter one is padded
        layers = words(prompt, 2, length, 16)
        return (
            layers.transpose(0, 1).reshape(2, len(prompt), length, 16).repeat(1, 1, 1, 2)[0],
            [*layers.unbind(1)],
            torch.ones(len(prompt), length),
        )

    pipe.get_prompt_embeds = get_prompt_embeds
    return pipe


def edit_prompts(seed: int) -> dict[str, Any]:
    return {"prompt": [json.dumps({"edit_instruction": text}) for text in two_prompts(seed)["prompt"]]}


def fibo2() -> Any:
    transformer = seeded(
        lambda: diffusers.BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=4,
            gist_max_text_len=8,
            axes_dims=(8, 4, 4),
            axes_lens=(64, 32, 32),
        )
    )
    return parts(diffusers.BriaFibo2Pipeline, transformer=transformer, scheduler=euler())


def fibo2_prompt(seed: int) -> dict[str, Any]:
    """Of two lengths, so that the shorter one is masked."""
    mask = torch.ones(2, 5 + seed, dtype=torch.bool)
    mask[1, 5:] = False
    return {
        "prompt_embeds": embeds(seed, prompt_embeds=(2, 2, 5 + seed, 16))["prompt_embeds"],
        "prompt_embeds_mask": mask,
    }


BRIA: dict[str, Tiny] = {
    "bria": Tiny(
        bria,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 32)),
        fixed=SQUARE,
        elements=4 * 16,
        exact=False,
        **GUIDED,
    ),
    "fibo": Tiny(fibo, two_prompts, fixed=SQUARE, elements=4 * 16, exact=False, **GUIDED),
    "fibo edit": Tiny(
        lambda: fibo("BriaFiboEditPipeline", vae=wan_vae()),
        edit_prompts,
        fixed={**SQUARE, "image": [picture(), picture(1)]},
        elements=4 * 16,
        kept=(0, 4),
        exact=False,
        **GUIDED,
    ),
    "fibo 2": Tiny(fibo2, fibo2_prompt, fixed=SQUARE, elements=4 * 4 * 4, **GUIDED),
}
