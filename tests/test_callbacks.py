"""Callbacks and interrupts under the guard: what they see, what they may change, what stays readable after them."""

from __future__ import annotations

import pytest
import torch

import fastguard
from tests import pipelines
from tests.guarded import SCHEDULERS, STEPS, call, same


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def test_callback_sees_every_step(sd):
    def collector(seen):
        def callback(pipe, step, timestep, kwargs):
            seen.append((step, int(timestep), kwargs["latents"]))
            return kwargs

        return callback

    stock, ours = [], []
    call(sd, callback_on_step_end=collector(stock))
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=collector(ours))
    assert [s[:2] for s in ours] == [s[:2] for s in stock]
    for (_, _, a), (_, _, b) in zip(ours, stock, strict=True):  # kept latents are not overwritten by later steps
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


def _replace(pipe, step, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.5}


def _in_place(pipe, step, timestep, kwargs):
    kwargs["latents"].mul_(0.5)
    return {}


def _scale(pipe, step, timestep, kwargs):
    pipe._guidance_scale += 1.0
    return {}


def _cut_off(pipe, step, timestep, kwargs):
    if step != 2:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}


@pytest.mark.parametrize("callback", [_replace, _in_place, _scale, _cut_off], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_callback_changes_are_honoured(callback, scheduler):
    pipe = pipelines.sd(scheduler=SCHEDULERS[scheduler]())
    same(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )


def test_what_a_call_notes_on_the_pipeline_stays_readable(sd):
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=_scale)
        assert sd.guidance_scale == 4.0 + STEPS
        assert sd.num_timesteps == STEPS
        assert len(sd.scheduler.timesteps) == STEPS


@pytest.mark.parametrize("through", ["argument", "original"])
def test_interrupt(sd, through):
    def callback(pipe, step, timestep, kwargs):
        if step == 2:
            (pipe if through == "argument" else sd)._interrupt = True
        return kwargs

    stock = call(sd, callback_on_step_end=callback)
    with fastguard.enable(sd, "cfg") as guard:
        ours = call(sd, callback_on_step_end=callback)
        assert guard.report[0].denoiser_rows == 2 * 3
        after = call(sd)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())
    torch.testing.assert_close(after, call(sd), rtol=0, atol=1e-4 * stock.abs().max().item())
