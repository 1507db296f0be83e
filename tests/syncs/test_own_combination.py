"""Pipelines that combine their branches themselves wait for the device where stock waits, and nowhere else."""

from __future__ import annotations

import diffusers
import pytest
import torch

import fastguard
from fastguard.loop.guide import Guide
from fastguard.syncs.stream import TO_DEVICE
from tests.families import tiny
from tests.families.test_verify import Unknown
from tests.families.tiny import CASES, parts, run


def lines(pipe, arguments):
    report = fastguard.find_syncs(pipe, steps=3, **arguments)
    assert report.broke_off is None
    return sorted((op.sync, op.code) for op in report.ops)


EACH = [
    pytest.param(name, policy, marks=pytest.mark.slow if policy == "anchored" and name != "flux" else [])
    for policy in ("cfg", "og+dtp", "stp", "anchored")
    for name in ("flux", "qwen", "wan")
]


@pytest.mark.parametrize(("name", "policy"), EACH)
def test_the_same_waits_as_stock(name, policy):
    case = CASES[name]
    pipe, arguments = case.make(), case.guided()
    stock = lines(pipe, arguments)
    gate = {} if policy == "cfg" else {"gate": 0.02}
    with fastguard.enable(pipe, policy, **gate):
        assert lines(pipe, arguments) == stock


def test_a_class_that_nobody_declared_is_searched_as_it_was_probed():
    case = CASES["flux"]
    known = case.make()
    pipe, arguments = parts(Unknown, transformer=known.transformer, scheduler=known.scheduler), case.guided()
    with fastguard.enable(pipe, "cfg", family="probe"):
        run(case, pipe, case.guided())
        assert lines(pipe, arguments) == lines(known, arguments)


def test_a_scale_that_changes_with_the_network_is_brought_to_the_device_once():
    case = CASES["wan 2.2"]
    pipe, arguments = case.make(), case.guided()
    stock = lines(pipe, arguments)
    with fastguard.enable(pipe, "og+dtp", gate=0.02):
        more = list(lines(pipe, arguments))
    for one in stock:
        more.remove(one)
    assert [kind for kind, _ in more] == [TO_DEVICE] * 2, "guidance and rules, at the boundary"


def test_a_planted_wait_is_found(monkeypatch):
    call = Guide.__call__

    def waiting(self, uncond, *args, **kwargs):
        assert uncond.sum().item() != 1.0
        return call(self, uncond, *args, **kwargs)

    case = CASES["flux"]
    pipe, arguments = case.make(), case.guided()
    stock = lines(pipe, arguments)
    monkeypatch.setattr(Guide, "__call__", waiting)
    with fastguard.enable(pipe, "og+dtp", gate=0.02):
        assert len(lines(pipe, arguments)) > len(stock)


def meta(kind, **config):
    with torch.device("meta"):
        return kind(**config).to(torch.bfloat16)


def embeds(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def flux():
    """black-forest-labs/FLUX.1-dev at 1024 pixels."""
    transformer = meta(diffusers.FluxTransformer2DModel, guidance_embeds=True)
    pipe = tiny.parts(diffusers.FluxPipeline, transformer=transformer, scheduler=tiny.euler())
    both = {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)}
    given = {f"{sign}{name}": embeds(*shape) for sign in ("", "negative_") for name, shape in both.items()}
    return pipe, {**given, "true_cfg_scale": 4.0, "height": 1024, "width": 1024}


def qwen():
    """Qwen/Qwen-Image at 1024 pixels."""
    transformer = meta(diffusers.QwenImageTransformer2DModel, guidance_embeds=False)
    pipe = tiny.parts(diffusers.QwenImagePipeline, transformer=transformer, scheduler=tiny.euler())
    given = {}
    for sign in ("", "negative_"):
        given |= {f"{sign}prompt_embeds": embeds(1, 64, 3584), f"{sign}prompt_embeds_mask": torch.ones(1, 64).long()}
    return pipe, {**given, "true_cfg_scale": 4.0, "height": 1024, "width": 1024}


def wan():
    """Wan-AI/Wan2.1-T2V-1.3B, 17 frames of 480 x 832."""
    transformer = meta(diffusers.WanTransformer3DModel, num_attention_heads=12, num_layers=30, ffn_dim=8960)
    pipe = tiny.parts(diffusers.WanPipeline, transformer=transformer, scheduler=tiny.unipc())
    given = {"prompt_embeds": embeds(1, 512, 4096), "negative_prompt_embeds": embeds(1, 512, 4096, seed=1)}
    return pipe, {**given, "guidance_scale": 5.0, "height": 480, "width": 832, "num_frames": 17}


@pytest.mark.slow
@pytest.mark.parametrize("make", [flux, qwen, wan])
def test_the_same_waits_as_stock_at_real_size(make):
    pipe, arguments = make()
    stock = lines(pipe, arguments)
    for policy in ("og+dtp", "anchored"):
        with fastguard.enable(pipe, policy, gate=0.02):
            assert lines(pipe, arguments) == stock, policy
