"""PNDM and Heun decide as DDIM does, within one observation: the rule runs once per noise level, not once per row.

But for a few prompts, where DDIM's samples, which are of first order, have gone another way: PNDM and Heun, which are not, agree there, and
DDIM's decision was nearer to the other one than its curve is to theirs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import pytest
import torch

import fastguard
from fastguard.testbed import load, prompts

pytestmark = pytest.mark.slow

PROMPTS = [p.prompt for p in prompts("D", "test")]
FEW = len(PROMPTS) // 10
# All on DDIM's timesteps, so that an observation of one is an observation of the others.
SAME = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULERS = {
    "ddim": lambda config: diffusers.DDIMScheduler.from_config({**config, **SAME}),
    "pndm": lambda config: diffusers.PNDMScheduler.from_config({**config, **SAME, "skip_prk_steps": True}),
    "heun": lambda config: diffusers.HeunDiscreteScheduler.from_config({**config, **SAME}),
}


def decisions(name: str, policy: fastguard.Policy) -> list:
    pipe = load()
    pipe.scheduler = SCHEDULERS[name](pipe.scheduler.config)
    with fastguard.enable(pipe, policy) as guard:
        generator = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        pipe(PROMPTS, num_inference_steps=50, generator=generator, output_type="latent")
        return list(guard.report)


POLICIES = {
    "paper-dtp": fastguard.policy("paper-dtp"),
    "tuned": fastguard.policy(
        "dtp", before=-1.0, opposite_steps=3, min_drop=0.3, deadline=700.0
    ),  # what tuning.json kept
    "drop": fastguard.policy("dtp", rule="drop", magnitude="x0", deadline=None),
}


@pytest.fixture(scope="module", params=POLICIES)
def reports(request):
    return {name: decisions(name, POLICIES[request.param]) for name in SCHEDULERS}


def late(report) -> float:
    """When an image passed over, in observations from the end of the timesteps; one that never did is later than all."""
    return -math.inf if report.transition_timestep is None else report.transition_timestep / 20


def apart(a, b) -> float:
    return 0.0 if late(a) == late(b) else abs(late(a) - late(b))


def curves_differ(a, b) -> float:
    """The largest relative difference of d up to the earlier of two transitions, at the first row of each noise level."""
    curves = [{t: d for t, d in reversed(list(zip(r.timesteps, r.d_curve, strict=True))) if d} for r in (a, b)]
    common = [t for t in set.intersection(*map(set, curves)) if t / 20 >= max(late(a), late(b))]
    return max(abs(math.log(curves[0][t] / curves[1][t])) for t in common)


@pytest.mark.parametrize("name", ["pndm", "heun"])
def test_decides_as_ddim(name, reports):
    ddim, other = reports["ddim"], reports[name]
    assert sum(r.transition_timestep is not None for r in ddim) >= len(PROMPTS) // 2, "the rule hardly fired"
    differ = [(a, b) for a, b in zip(ddim, other, strict=True) if apart(a, b) > 1]
    assert len(differ) <= FEW
    for pair in differ:
        first = max(pair, key=late)
        assert first.margin < curves_differ(*pair)


def test_pndm_decides_as_heun(reports):
    """Both follow the samples' path more closely than DDIM does: what they disagree on is not the path but the count."""
    differ = [apart(a, b) for a, b in zip(reports["pndm"], reports["heun"], strict=True) if apart(a, b) > 1]
    assert len(differ) <= 1, differ


def test_rows_instead_of_noise_levels_would_misfire(monkeypatch):
    """What the agreement rests on: with every row as an observation Heun fires within its first rows, at a mid-stage."""
    import fastguard.schedules.compiler as module

    original = module.compile_schedule

    def every_row(*args, **kwargs):
        schedule = original(*args, **kwargs)
        rows = schedule.rows.clone()
        rows[:-1, module.Row.OBSERVE] = 1.0
        return replace(schedule, rows=rows)

    monkeypatch.setattr("fastguard.pipelines.scheduler.compile_schedule", every_row)
    rows = [r.transition_step for r in decisions("heun", POLICIES["paper-dtp"])]
    assert sum(k is not None and k <= 6 for k in rows) > len(rows) // 2
