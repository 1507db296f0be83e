"""Models that change in their own forward, or while somebody records them: what a replay would not do again."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import fastguard
from fastguard.capture.runner import BodyRunner
from tests import pipelines
from tests.capture import simulator
from tests.capture.calls import call, eager
from tests.capture.changes import lora_scale, with_lora

pytestmark = pytest.mark.usefixtures("recorders")


class Processor(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return self.changed(super().__call__(*args, **kwargs))


class Counts(Processor):
    calls = 0

    def changed(self, out):
        self.calls += 1
        return out * (1 + 0.3 * (self.calls % 5))


class Remembers(Processor):
    bank = None

    def changed(self, out):
        mixed = out if self.bank is None or self.bank.shape != out.shape else out * 0.5 + self.bank * 0.5
        self.bank = out
        return mixed


class Draws(Processor):
    def changed(self, out):
        return out * (1 + random.random())


class DrawsFromNumPy(Processor):
    def changed(self, out):
        return out * (1 + np.random.rand())


class CountsInABuffer(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.inner(x) * (1 + 0.1 * self.calls)


def with_processors(kind):
    return lambda unet: unet.set_attn_processor({name: kind() for name in unet.attn_processors})


def with_buffer(unet):
    inner = unet.conv_in
    unet.conv_in = CountsInABuffer(inner.inner if isinstance(inner, CountsInABuffer) else inner)


CHANGES = {
    **{kind.__name__: with_processors(kind) for kind in (Counts, Remembers, Draws, DrawsFromNumPy)},
    "CountsInABuffer": with_buffer,
}


def begin(pipe, change):
    change(pipe.unet)
    random.seed(0)
    np.random.seed(0)


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_that_changes_the_model_runs_eagerly_and_once_a_row(change, mode, blind, monkeypatch, recorders):
    """Planted: nobody looks at the model again after its first forward."""
    pipe = pipelines.sd()
    images = {}
    for capture in ("off", mode):
        begin(pipe, CHANGES[change])
        if blind:
            monkeypatch.setattr(BodyRunner, "_watch", lambda self, place: lambda: None)
        with fastguard.enable(pipe, "cfg", capture=capture) as guard:
            images[capture] = [call(pipe, steps=3) for _ in range(3)]
    equal = [torch.equal(a, b) for a, b in zip(images["off"], images[mode], strict=True)]
    if blind:
        assert not all(equal)
        return
    assert all(equal)
    assert guard.report.path == "fused" and "the forward changes the model" in guard.report.reason
    assert recorders[0].recorded == 0, "nor is it tried again and again"


class MakesItselfReady(Processor):
    table = None

    def changed(self, out):
        if self.table is None:
            self.table = torch.full((), 1.5)
        return out * self.table


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_a_first_forward_that_makes_the_model_ready_is_no_obstacle(mode, recorders):
    pipe = pipelines.sd()
    with_processors(MakesItselfReady)(pipe.unet)
    expected, _ = eager(pipe)
    with_processors(MakesItselfReady)(pipe.unet)
    with fastguard.enable(pipe, "cfg", capture=mode) as guard:
        for _ in range(3):
            assert torch.equal(call(pipe), expected)
        assert guard.report.path == f"fused, {mode} graph" and guard.report.reason is None
        assert [info.replays for info in guard.graphs()] == [3 * 3 - 1 if mode == "step" else 2]
    assert recorders[0].recorded == 1


@pytest.mark.parametrize("when", ["before the second branch", "in the warm-up"])
def test_another_thread_changes_the_model_while_it_is_recorded(when, monkeypatch, recorders):
    """The graph that comes of it is not kept under the key of the model as it was before."""
    pipe, record = with_lora(), simulator.Recorder.record
    policy = fastguard.policy("stp", t_star=600)
    lora_scale(pipe, False)
    expected, _ = eager(pipe, policy, steps=4)

    def racing(self, body, warm_up, keeps):
        def changing():
            warm_up()
            lora_scale(pipe, True)

        if when == "in the warm-up" and self.recorded == 0:
            return record(self, body, changing, keeps)
        graph = record(self, body, warm_up, keeps)
        if when != "in the warm-up" and self.recorded == 1:
            lora_scale(pipe, True)
        return graph

    with fastguard.enable(pipe, policy, capture="step") as guard:
        monkeypatch.setattr(simulator.Recorder, "record", racing)
        call(pipe, steps=4)
        monkeypatch.undo()
        lora_scale(pipe, False)
        for _ in range(2):
            assert torch.equal(call(pipe, steps=4), expected)
        assert guard.report.path == "fused, step graph" and guard.report.reason is None


def test_one_call_with_wrong_arguments_costs_nobody_else_their_graphs(sd):
    embeds, negative = sd.encode_prompt(["a", "b"], "cpu", 1, True)
    with fastguard.enable(sd, "cfg", capture="step") as guard:
        expected = call(sd, steps=2)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            call(sd, steps=2, prompt=None, prompt_embeds=embeds[..., :16], negative_prompt_embeds=negative[..., :16])
        assert guard.graphs.failure is None and len(guard.graphs()) == 1
        assert torch.equal(call(sd, steps=2), expected)
        assert guard.report.path == "fused, step graph" and guard.report.reason is None


@pytest.mark.parametrize("mode", ["off", "step", "loop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(sd, mode, dtype):
    expected, _ = eager(sd, steps=2)
    with fastguard.enable(sd, "cfg", capture=mode) as guard:
        call(sd, steps=2)
        graphs = len(guard.graphs())
        torch.set_default_dtype(dtype)
        try:
            image = call(sd, steps=2)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.allclose(image, expected, atol=1e-2), "embeddings of timesteps may be computed in it"
        assert len(guard.graphs()) == 2 * graphs, "it is in the key"


@pytest.mark.parametrize("by", ["clear", "disable"])
def test_a_denoiser_that_was_replaced_is_not_kept_alive(by):
    pipe = pipelines.sd()
    guard = fastguard.enable(pipe, "cfg", capture="step")
    call(pipe, steps=2)
    old = weakref.ref(pipe.unet)
    pipe.unet = pipelines.sd().unet
    guard.graphs.clear() if by == "clear" else guard.disable()
    gc.collect()
    assert old() is None
    guard.disable()
