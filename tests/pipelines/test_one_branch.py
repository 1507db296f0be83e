"""Rows of one branch run only where the denoiser is known to treat its rows alike: whoever keeps features or reads halves gets both."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook as OffloadHook
from accelerate.hooks import add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0

import fastguard
from fastguard.fronts.guider import GuardedGuidance
from fastguard.pipelines.outputs import needs_both
from tests import pipelines
from tests.guarded import STEPS, call


class Halves(AttnProcessor):
    """Treats the second half of its batch, the conditional one, otherwise."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        result = super().__call__(attn, hidden_states, *args, **kwargs)
        half = len(result) // 2
        return torch.cat([result[:half], 1.2 * result[half:]])


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


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


def second_half_less(output):
    u, c = output[0].chunk(2)
    return (torch.cat([u, 0.9 * c]),)


def outer_hook(unet):
    unet.register_forward_hook(lambda module, inputs, output: second_half_less(output))


def outer_pre_hook(unet):
    def hook(module, inputs):
        u, c = inputs[0].chunk(2)
        return (torch.cat([u, 0.9 * c]), *inputs[1:])

    unet.register_forward_pre_hook(hook)


def replace_with_less(unet):
    forward = unet.forward
    unet.forward = lambda *args, **kwargs: second_half_less(forward(*args, **kwargs))


def replaced_over_offload(unet):
    add_hook_to_module(unet, OffloadHook())
    replace_with_less(unet)


def replaced_under_offload(unet):
    replace_with_less(unet)
    add_hook_to_module(unet, OffloadHook(), append=True)


def replaced_inside_offload(unet):
    add_hook_to_module(unet, OffloadHook())
    forward = unet._old_forward
    unet._old_forward = lambda *args, **kwargs: second_half_less(forward(*args, **kwargs))


def replaced_over_registry(unet):
    HookRegistry.check_if_exists_or_initialize(unet)
    replace_with_less(unet)


def replaced_over_group_offload(unet):
    group_offload(unet)
    replace_with_less(unet)


def group_offload(unet):
    if not torch.accelerator.is_available() and TORCH < (2, 7):
        pytest.skip("diffusers' group offloading asks torch 2.6 for an accelerator, which has none here")
    cpu = torch.device("cpu")
    apply_group_offloading(unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def accelerate_hook(unet):
    class Less(OffloadHook):
        def post_forward(self, module, output):
            return second_half_less(output)

    add_hook_to_module(unet, OffloadHook())
    add_hook_to_module(unet, Less(), append=True)


PLANTS = {
    outer_hook: "a forward hook on UNet2DConditionModel",
    outer_pre_hook: "a forward hook on UNet2DConditionModel",
    replaced_over_offload: r"forward\(\) is replaced on a UNet2DConditionModel",
    replaced_under_offload: r"forward\(\) is replaced on a UNet2DConditionModel",
    replaced_inside_offload: r"forward\(\) is replaced on a UNet2DConditionModel",
    replaced_over_registry: r"forward\(\) is replaced on a UNet2DConditionModel",
    replaced_over_group_offload: r"forward\(\) is replaced on a UNet2DConditionModel",
    accelerate_hook: "the hook Less on UNet2DConditionModel",
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


def test_a_hook_for_every_module():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "a forward hook for every module" in needs_both(pipelines.sd().unet, {})
    finally:
        handle.remove()


def test_a_class_forward_replaced_under_its_old_name(monkeypatch):
    """functools.wraps copies the library's module name onto the user's function."""
    unet = pipelines.sd().unet
    kind = type(unet.mid_block)
    original = kind.forward

    @functools.wraps(original)
    def cached(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    assert needs_both(unet, {}) is None
    monkeypatch.setattr(kind, "forward", cached)
    assert "is not one of the libraries' own layers" in needs_both(unet, {})


def watched_by_a_guider(unet):
    guider = GuardedGuidance()
    guider.scheduler = pipelines.ddim()
    guider.prepare_models(unet)


HARMLESS = {
    "nothing": lambda unet: None,
    "fastguard's own hook": watched_by_a_guider,
    "processors": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "offload": lambda unet: add_hook_to_module(unet, OffloadHook()),
    "offload twice": lambda unet: [add_hook_to_module(unet, OffloadHook(), append=True) for _ in range(2)],
    "offload of the layers": lambda unet: cpu_offload(unet, execution_device=torch.device("cpu")),
    "group offload": group_offload,
    "group offload and offload": lambda unet: (group_offload(unet), add_hook_to_module(unet, OffloadHook())),
    "an empty registry": HookRegistry.check_if_exists_or_initialize,
}


@pytest.mark.parametrize("harmless", HARMLESS)
def test_one_branch_where_rows_are_alike(harmless):
    images = []
    for plant in ("nothing", harmless):
        pipe, rows = pipelines.sd(), []
        HARMLESS[plant](pipe.unet)
        embed = pipe.unet.get_time_embed

        def counting(sample, timestep, embed=embed, rows=rows):
            rows.append(len(sample))
            return embed(sample, timestep)

        pipe.unet.get_time_embed = counting
        with fastguard.enable(pipe, "stp", t_star=500) as guard:
            images.append(call(pipe))
            assert guard.report[0].denoiser_rows < 2 * STEPS and guard.report.reason is None
        assert sum(rows) == 2 * guard.report[0].denoiser_rows
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
