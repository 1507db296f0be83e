"""Anchored guidance behind pipelines: the same images by the table, by the scheduler's own step(), with a callback, as graphs."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import fastguard
from tests import pipelines, schedulers
from tests.capture import simulator
from tests.families.tiny import CASES, run
from tests.guarded import STEPS, call, mask, picture

SCHEDULERS = {
    "ddim": pipelines.ddim,
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**pipelines.BETAS),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**pipelines.BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**pipelines.BETAS),
    "v": lambda: pipelines.ddim(prediction_type="v_prediction"),
}


def anchored(pipe, **kwargs):
    with fastguard.enable(pipe, ["anchored", "cfg"], capture="off") as guard:
        images = call(pipe, guidance_scale=7.5, **kwargs)
        return images, guard.report


def agree(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_own_step_gives_what_the_table_gives(name):
    pipe = pipelines.sd(scheduler=SCHEDULERS[name]())
    fused, report = anchored(pipe)
    assert report.path == "fused"
    own = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    stepped, hooked = anchored(pipe)
    assert hooked.path == "own step"
    agree(stepped, fused)
    for ours, theirs in zip(report, hooked, strict=True):
        a, b = ([np.nan if p is None else p for p in one.share_curve] for one in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_one_image_is_anchored_and_the_other_has_plain_guidances_bits():
    pipe = pipelines.sd()
    images, report = anchored(pipe)
    with fastguard.enable(pipe, "cfg", capture="off"):
        plain = call(pipe, guidance_scale=7.5)
    assert torch.equal(images[1], plain[1]) and not torch.allclose(images[0], plain[0], rtol=1e-3)
    assert report[0].share_curve[0] == pytest.approx(1.0, abs=1e-5), "the anchor is the first prediction itself"
    assert all(share is None for share in report[1].share_curve)
    assert report[0].denoiser_rows == 2 * STEPS


def test_a_callback_that_changes_nothing_changes_nothing():
    pipe = pipelines.sd()
    agree(anchored(pipe, callback_on_step_end=lambda pipe, step, t, values: values)[0], anchored(pipe)[0], 1e-5)


def test_inpaint_and_image_to_image_run():
    for kind, arguments in (
        ("StableDiffusionInpaintPipeline", {"image": picture(), "mask_image": mask(), "height": 32, "width": 32}),
        ("StableDiffusionImg2ImgPipeline", {"image": picture(), "strength": 0.8}),
    ):
        pipe = pipelines.sd(kind)
        own = pipe.scheduler.step
        fused, _ = anchored(pipe, **arguments)
        pipe.scheduler.step = lambda *args, own=own, **kwargs: own(*args, **kwargs)
        agree(anchored(pipe, **arguments)[0], fused)


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("name", ["ddim", "euler-ancestral"])
def test_graphs(name, mode):
    pipe = pipelines.sd(scheduler=schedulers.SD[name]())
    expected, report = anchored(pipe)
    with simulator.recording(), fastguard.enable(pipe, ["anchored", "cfg"], capture=mode) as guard:
        for _ in range(2):
            assert torch.equal(call(pipe, guidance_scale=7.5), expected)
            assert guard.report.path == f"fused, {mode} graph", guard.report.reason
            assert guard.report[0].share_curve == report[0].share_curve


@pytest.mark.parametrize("name", ["flux", "wan", "qwen"])
def test_own_combination(name):
    """The anchored image differs from stock, the other has stock's bits; the share begins at 1."""
    case = CASES[name]
    pipe, arguments = case.make(), case.guided()
    stock = run(case, pipe, arguments)
    with fastguard.enable(pipe, ["anchored", "cfg"]) as guard:
        ours = run(case, pipe, arguments)
        report = guard.report
    assert torch.equal(ours[1], stock[1]) and not torch.allclose(ours[0], stock[0], rtol=1e-3)
    assert report[0].share_curve[0] == pytest.approx(1.0, abs=1e-4)
