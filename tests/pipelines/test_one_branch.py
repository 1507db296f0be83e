"""Rows of one branch run only where the denoiser is known to treat its rows alike: whoever keeps features or reads halves gets both."""

from __future__ import annotations

import re

import pytest
import torch
from accelerate.hooks import ModelHook as OffloadHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0

import fastguard
from fastguard.pipelines.outputs import needs_both
from tests import pipelines
from tests.guarded import STEPS, call


class Halves(AttnProcessor):
    """Treats the second half of its batch, the conditional one, otherwise."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        result = super().__call__(attn, hidden_states, *args, **kwargs)
        half = len(result) // 2
        return torch.cat([result[:half], 1.2 * result[half:]])


def by_halves(unet):
    unet.set_attn_processor(Halves())


def replaced_forward(unet):
    """As DeepCache does: a block gives what it gave a row before, every other row."""
    block, kept = unet.mid_block, []
    forward = block.forward

    def cached(*args, **kwargs):
        if len(kept) % 2 == 0:
            kept.append(forward(*args, **kwargs))
        else:
            kept.append(kept[-1])
        return kept[-1]

    block.forward = cached


def inner_hook(unet):
    kept = []

    def hook(module, inputs, output):
        kept.append(output)
        return output + 0.5 * kept[-2] if len(kept) > 1 else output

    unet.mid_block.register_forward_hook(hook)


class Keeping(ModelHook):
    """As diffusers' own caches do (PAB, FasterCache, TaylorSeer)."""

    _is_stateful = True

    def __init__(self):
        super().__init__()
        self.last = None

    def post_forward(self, module, output):
        result = output if self.last is None else output + 0.5 * self.last
        self.last = output
        return result

    def reset_state(self, module):
        self.last = None
        return module


def diffusers_hook(unet):
    HookRegistry.check_if_exists_or_initialize(unet.mid_block).register_hook(Keeping(), "keeping")


def another_class(unet):
    """As token merging does."""
    block = unet.mid_block

    class Merged(type(block)):
        def forward(self, hidden, *args, **kwargs):
            u, c = super().forward(hidden, *args, **kwargs).chunk(2)
            return torch.cat([u, 0.5 * (u + c)])

    block.__class__ = Merged


PLANTS = {
    by_halves: "attention processor Halves",
    replaced_forward: r"forward\(\) is replaced",
    inner_hook: "a forward hook on",
    diffusers_hook: "the hook keeping",
    another_class: "Merged is not one of the libraries' own",
}


@pytest.mark.parametrize("plant", PLANTS)
def test_both_branches_run_where_rows_may_differ(plant):
    images = []
    for monitor in (False, True):
        pipe = pipelines.sd()
        plant(pipe.unet)
        with fastguard.enable(pipe, "stp", monitor=monitor) as guard:
            images.append(call(pipe))
            report = guard.report
        assert report[0].denoiser_rows == 2 * STEPS
    assert torch.equal(*images)


@pytest.mark.parametrize("plant", PLANTS)
def test_the_report_says_why(plant):
    pipe = pipelines.sd()
    plant(pipe.unet)
    with fastguard.enable(pipe, "stp") as guard:
        call(pipe)
        assert guard.report[0].denoiser_rows == 2 * STEPS
        assert re.search("both branches run in every row: .*" + PLANTS[plant], guard.report.reason)
        fastguard.enable(pipe, "cfg")
        call(pipe)
        assert guard.report.reason is None, "where nothing would be left out there is nothing to say"


def test_diffusers_processors_that_read_halves():
    pipe = pipelines.sd()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    assert "PAGCFGIdentity" in needs_both(pipe.unet, {})


@pytest.mark.parametrize("harmless", ["counting", "processors", "offload"])
def test_one_branch_where_rows_are_alike(harmless):
    pipe, rows = pipelines.sd(), []
    if harmless == "counting":
        pipe.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    elif harmless == "processors":
        pipe.unet.set_attn_processor(AttnProcessor2_0())
    else:
        add_hook_to_module(pipe.unet, OffloadHook())
    with fastguard.enable(pipe, "stp", t_star=500) as guard:
        call(pipe)
        assert guard.report[0].denoiser_rows < 2 * STEPS and guard.report.reason is None
    assert harmless != "counting" or sum(rows) == 2 * guard.report[0].denoiser_rows
