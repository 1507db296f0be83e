"""Policy `cfg` gives stock diffusers' numbers, for every scheduler; `disable()` gives its bits back."""

from __future__ import annotations

import pytest
import torch

import fastguard
from tests import pipelines, schedulers


def generate(pipe, steps, *, latents, seeds=(1, 2), **kwargs):
    with torch.no_grad():
        return pipe(
            ["a red cat", "two dogs"],
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=pipelines.generators(list(seeds)),
            latents=latents.clone(),
            output_type="latent",
            **kwargs,
        ).images


def noise(pipe, channels=4):
    generator = torch.Generator().manual_seed(0)
    sigma = pipe.scheduler.init_noise_sigma if hasattr(pipe.scheduler, "init_noise_sigma") else 1.0
    del sigma  # pipelines scale given latents themselves
    return torch.randn(2, channels, 16, 16, generator=generator)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def check_same(pipe, steps, latents):
    stock = generate(pipe, steps, latents=latents)
    nudged = generate(pipe, steps, latents=torch.nextafter(latents, torch.full_like(latents, torch.inf)))
    with fastguard.enable(pipe, "cfg") as guard:
        ours = generate(pipe, steps, latents=latents)
        report = guard.report
    assert ours.dtype == stock.dtype
    own = relative(nudged, stock)
    # 1e-4 as the project promises; ten times what one unit in the last place of the input does to stock itself.
    assert relative(ours, stock) <= 1e-4
    assert relative(ours, stock) <= 10 * own
    again = generate(pipe, steps, latents=latents)
    assert torch.equal(again, stock), "disable() must give stock's bits back"
    return report


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", schedulers.SD)
def test_stable_diffusion(name, steps):
    pipe = pipelines.sd(scheduler=schedulers.SD[name]())
    report = check_same(pipe, steps, noise(pipe))
    assert report.path == "fused", report.reason


@pytest.mark.parametrize("name", schedulers.OWN_STEP)
def test_own_step(name):
    pipe = pipelines.sd(scheduler=schedulers.OWN_STEP[name]())
    report = check_same(pipe, 50, noise(pipe))
    assert report.path == "own step" and "rounding" in report.reason


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", schedulers.FLOW)
def test_stable_diffusion_3(name, steps):
    pipe = pipelines.sd3(scheduler=schedulers.FLOW[name]())
    report = check_same(pipe, steps, noise(pipe, 16))
    assert report.path == "fused", report.reason
