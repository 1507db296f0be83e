"""Every step of a guarded pipeline, from stock's own latents and stock's own denoiser outputs, lands where stock's landed."""

from __future__ import annotations

import pytest
import torch

import fastguard
from fastguard.kernels.layout import Row
from fastguard.pipelines.scheduler import Scheduling
from tests import pipelines, schedulers

# float32 has 6e-8; the table folds a step into one sum of at most six products, in another order than stock's.
TOLERANCE = 1e-6


class TableAnyway(Scheduling):
    """The callback of these tests hands back what the step gave, up to rounding: the table holds for every scheduler."""

    def compile(self, *args):
        self.callback = False
        return super().compile(*args)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr("fastguard.pipelines.attached.Scheduling", TableAnyway)


def run(pipe, steps, on_step, denoise):
    """One generation whose denoiser is `denoise(real_call)` and whose latents after each step go through `on_step`."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    forward, channels = denoiser.forward, denoiser.config.in_channels
    denoiser.forward = lambda *args, **kwargs: denoise(lambda: forward(*args, **kwargs))
    latents = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            pipe(
                ["a red cat", "two dogs"],
                num_inference_steps=steps,
                guidance_scale=5.0,
                generator=pipelines.generators([1, 2]),
                latents=latents,
                height=8 * pipe.vae_scale_factor,
                width=8 * pipe.vae_scale_factor,
                output_type="latent",
                callback_on_step_end=lambda _pipe, _step, _t, tensors: on_step(tensors["latents"]),
            )
    finally:
        denoiser.forward = forward


def worst_step(make, scheduler, steps) -> tuple[float, str]:
    """Largest difference of one step, relative to the largest value of its result; the path that was taken."""
    pipe = make(scheduler=scheduler())
    outputs, latents, errors = [], [], []

    def record(call):
        result = call()
        outputs.append(result[0].clone())
        return result

    def keep(x):
        latents.append(x.clone())
        return {}

    def compare(x):
        stock = latents[len(errors)]
        errors.append(float((x - stock).abs().max() / stock.abs().max()))
        return {"latents": stock.clone()}

    run(pipe, steps, keep, record)
    replay = iter(outputs)
    with fastguard.enable(pipe, "cfg") as guard:
        run(pipe, steps, compare, lambda _call: (next(replay),))
        path = guard.report.path
    assert len(errors) == len(latents) >= steps and next(replay, None) is None
    return max(errors), path


CASES = {
    **{name: (pipelines.sd, make) for name, make in {**schedulers.SD, **schedulers.OWN_STEP}.items()},
    **{name: (pipelines.sd3, make) for name, make in schedulers.FLOW.items()},
}


@pytest.mark.parametrize("steps", [20, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_every_step(name, steps):
    worst, path = worst_step(*CASES[name], steps)
    assert worst <= TOLERANCE, path
    assert path == "fused" or name in schedulers.OWN_STEP


def test_a_wrong_coefficient_is_seen(monkeypatch):
    """One coefficient of one row, wrong by 1e-5 of its value."""
    from dataclasses import replace

    import fastguard.pipelines.scheduler as module

    original = module.compile_schedule

    def wrong(*args, **kwargs):
        schedule = original(*args, **kwargs)
        rows = schedule.rows.clone()
        rows[7, Row.A] *= 1 + 1e-5
        return replace(schedule, rows=rows)

    monkeypatch.setattr(module, "compile_schedule", wrong)
    worst, _ = worst_step(pipelines.sd, schedulers.SD["ddim"], 20)
    assert worst > 3 * TOLERANCE
