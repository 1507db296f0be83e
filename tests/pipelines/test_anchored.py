"""Anchored guidance behind pipelines: the same images by the table, by the scheduler's own step(), with a callback, as graphs."""

from __future__ import annotations

import copy
import functools

import diffusers
import numpy as np
import pytest
import torch

import fastguard
from fastguard.kernels.layout import Row
from fastguard.policies import plan
from fastguard.schedules.compiler import compile_schedule
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
    "dpm-single-sde": lambda: diffusers.DPMSolverSinglestepScheduler(
        **pipelines.BETAS, algorithm_type="sde-dpmsolver++"
    ),
}


def anchored(pipe, **kwargs):
    with fastguard.enable(pipe, ["anchored", "cfg"], capture="off") as guard:
        images = call(pipe, guidance_scale=7.5, **kwargs)
        return images, guard.report


def wrap_step(pipe):
    """Make the guard call the scheduler's own step(), whose signature stays: pipelines look there whether it takes their generator."""
    step = pipe.scheduler.step
    pipe.scheduler.step = functools.wraps(step)(lambda *args, **kwargs: step(*args, **kwargs))


def agree(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_own_step_gives_what_the_table_gives(name):
    pipe = pipelines.sd(scheduler=SCHEDULERS[name]())
    fused, report = anchored(pipe)
    assert report.path == "fused"
    wrap_step(pipe)
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


def _halved(pipe, step, timestep, values):
    return {"latents": values["latents"] * 0.5} if step in (1, 3) else {}


def formula(pipe, callback=None, scale=7.5):
    """One anchored image and one plain one by hand: stock's parts in the order of stock's loop, `restrain` in float64 on x0.

    Of epsilon predictions of schedulers that keep the variance: x0 = (x - sqrt(1 - alpha) e) / sqrt(alpha).
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    observed = compile_schedule(scheduler).rows[:-1, Row.OBSERVE].bool().tolist()
    embeds = torch.cat(pipe.encode_prompt(["a red cat", "two dogs"], "cpu", 1, True)[::-1])
    generator = torch.Generator().manual_seed(3)
    x = pipe.prepare_latents(2, 4, 32, 32, embeds.dtype, torch.device("cpu"), generator)
    rho, shares = 0.0, []
    for k, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            u, c = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=embeds).sample.chunk(2)
        alpha = float(scheduler.alphas_cumprod[t])
        x0, u0, c0 = ((x[0] - (1 - alpha) ** 0.5 * e).double() / alpha**0.5 for e in (0.0, u[0], c[0]))
        if k == 0:
            m, mu = c0, u0
            sharp = (float((m - mu).square().mean().sqrt()) - plan.FAINT) / (plan.SHARP - plan.FAINT)
            sharp = min(max(sharp, 0.0), 1.0)
        elif observed[k]:
            v = 2 * float(((u0 - mu) * (m - mu)).sum() / ((u0 - mu).square().sum() + (m - mu).square().sum()))
            rho = min(max(rho + plan.ETA * 50 / sum(observed) * (v - plan.DRIFT), 0.0), plan.MOST)
        a = m - u0
        shares.append(float(((c0 - u0) * a).sum() / a.square().sum()))
        taken = max(scale - ((1 - sharp) - plan.BACK * scale * sharp - rho), 0.0) * max(shares[-1], 0.0)
        guided = u + scale * (c - u)
        added = scale * (c0 - u0) - taken * a
        added *= min(1.0, float((m - mu).norm() / added.norm()) / max(sharp, 1e-9))
        guided[0] = ((x0 - (u0 + added)) * (alpha / (1 - alpha)) ** 0.5).float()
        x = scheduler.step(guided, t, x).prev_sample
        if callback is not None:
            x = callback(pipe, k, t, {"latents": x}).get("latents", x)
    return x, shares


@pytest.mark.parametrize("callback", [None, _halved], ids=["", "changed latents"])
@pytest.mark.parametrize("own", [False, True], ids=["table", "own step"])
def test_latents_that_a_callback_changed(own, callback, monkeypatch):
    follows(pipelines.sd(), "own step" if own else "fused", callback, monkeypatch, own=own)


CLIPS = {"clip_sample": True, "clip_sample_range": 3.0}
OWN_STEP = {
    "clips": (lambda: pipelines.ddim(**CLIPS), "clip_sample=True"),
    "runge-kutta": (lambda: diffusers.PNDMScheduler(**pipelines.BETAS, steps_offset=1), "Runge-Kutta"),
}


@pytest.mark.parametrize("callback", [None, _halved], ids=["", "changed latents"])
@pytest.mark.parametrize("name", OWN_STEP)
def test_schedulers_without_a_table(name, callback, monkeypatch):
    make, why = OWN_STEP[name]
    pipe = pipelines.sd()
    pipe.scheduler = make()  # the pipeline's constructor turns clip_sample off
    assert why in follows(pipe, "own step", callback, monkeypatch).reason


def follows(pipe, path, callback, monkeypatch, own=False):
    """What the pipeline makes on this path is what the formula makes, with numbers at which rho moves and stays within its bounds."""
    for name, value in {"ETA": 0.02, "DRIFT": -1.0}.items():
        monkeypatch.setattr(plan, name, value)
    want, shares = formula(pipe, callback)
    if own:
        wrap_step(pipe)
    images, report = anchored(pipe, **({} if callback is None else {"callback_on_step_end": callback}))
    assert report.path == path
    agree(images, want)
    np.testing.assert_allclose(report[0].share_curve, shares, atol=1e-3)
    return report


def test_inpaint_and_image_to_image_run():
    for kind, arguments in (
        ("StableDiffusionInpaintPipeline", {"image": picture(), "mask_image": mask(), "height": 32, "width": 32}),
        ("StableDiffusionImg2ImgPipeline", {"image": picture(), "strength": 0.8}),
    ):
        pipe = pipelines.sd(kind)
        fused, _ = anchored(pipe, **arguments)
        wrap_step(pipe)
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
