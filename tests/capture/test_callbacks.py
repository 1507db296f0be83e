"""Whoever looks at, changes or stops a generation: callbacks between two steps, interrupts from another thread."""

from __future__ import annotations

import threading

import pytest
import torch

import fastguard
from tests import pipelines, schedulers
from tests.capture import simulator
from tests.capture.calls import call, check, eager

pytestmark = pytest.mark.usefixtures("recorders")

# Callbacks ------------------------------------------------------------------------------------------------------------------


def _replace(pipe, step, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.5}


def _in_place(pipe, step, timestep, kwargs):
    kwargs["latents"].mul_(0.5)
    kwargs["prompt_embeds"].data.mul_(1.1)  # a write that no version counts
    return {}


def _scale(pipe, step, timestep, kwargs):
    pipe._guidance_scale += 1.0
    return {}


def _cut_off(pipe, step, timestep, kwargs):
    if step != 1:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}


def _freeu(pipe, step, timestep, kwargs):
    pipe.unet.enable_freeu(s1=0.9 - 0.2 * step, s2=0.2, b1=1.2, b2=1.4)
    if step == 3:
        pipe.unet.disable_freeu()
    return {}


@pytest.mark.parametrize("callback", [_replace, _in_place, _scale, _cut_off, _freeu])
@pytest.mark.parametrize("mode", ["step", "loop"])
def test_callbacks_run_step_by_step(callback, mode):
    pipe = pipelines.sd(scheduler=schedulers.SD["euler"]())
    kept = []

    def keeping(pipe, step, timestep, kwargs):
        kept.append((kwargs["latents"], kwargs["latents"].clone()))
        return callback(pipe, step, timestep, kwargs)

    inputs = ["latents", "prompt_embeds"]
    report = check(pipe, mode=mode, path="fused, step graph", steps=4, callback_on_step_end=callback,
                   callback_on_step_end_tensor_inputs=inputs)  # fmt: skip
    assert (report.reason is None) == (mode == "step") or "a callback looks" in report.reason
    if callback is _replace:
        with fastguard.enable(pipe, "cfg", capture="step"):
            call(pipe, callback_on_step_end=keeping, callback_on_step_end_tensor_inputs=inputs)
        assert all(torch.equal(a, b) for a, b in kept), "kept latents are not overwritten"


def test_half_precision_latents_keep_their_float32_under_a_callback():
    pipe = pipelines.sd().to(torch.bfloat16)
    check(pipe, steps=4, callback_on_step_end=lambda *args: {})


# Interrupts -----------------------------------------------------------------------------------------------------------------


def interrupt(pipe):
    """As from another thread: it holds the pipeline that was called, not the copy on which the loop runs."""
    thread = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
    thread.start()
    thread.join()


@pytest.fixture
def interrupted_at(sd, monkeypatch):
    """From a number of launches to nothing: the last of them is interrupted."""
    replay = simulator.Recorder.replay

    def plant(launch):
        launches = []

        def interrupting(self, tape):
            launches.append(tape)
            if len(launches) == launch:
                interrupt(sd)
            replay(self, tape)

        monkeypatch.setattr(simulator.Recorder, "replay", interrupting)

    return plant


def test_an_interrupt_from_another_thread_ends_a_generation_of_steps(sd, interrupted_at):
    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 1
        return {}

    expected, _ = eager(sd, steps=4, callback_on_step_end=stop)
    interrupted_at(2)
    with fastguard.enable(sd, "cfg", capture="step") as guard:
        assert torch.equal(call(sd, steps=4), expected)
        assert guard.report.path == "fused, step graph" and guard.graphs()[0].replays == 2
        assert not torch.equal(call(sd, steps=4), expected), "the next call is another one"


def test_a_generation_in_one_launch_runs_to_its_end(sd, interrupted_at):
    """docs/capture.md: an interrupt ends it before its launch, or not at all."""
    expected, _ = eager(sd, steps=4)
    interrupted_at(1)
    with fastguard.enable(sd, "cfg", capture="loop") as guard:
        assert torch.equal(call(sd, steps=4), expected)
        assert guard.report.path == "fused, loop graph" and sd._interrupt


@pytest.mark.parametrize("mode", ["off", "step", "loop"])
def test_an_interrupt_before_the_loop(mode):
    pipe = pipelines.sd()
    prepare, prepared = pipe.prepare_latents, []

    def interrupting(*args, **kwargs):
        interrupt(pipe)
        prepared.append(prepare(*args, **kwargs))
        return prepared[-1]

    pipe.prepare_latents = interrupting
    with fastguard.enable(pipe, "cfg", capture=mode) as guard:
        assert torch.equal(call(pipe), prepared[0])
        assert guard.graphs() == [] and pipe.unet is not None


def test_auto_never_chooses_loop(sd):
    """A generation that nobody asked to be one launch can be interrupted."""
    check(sd, mode="auto", path="fused, step graph")
