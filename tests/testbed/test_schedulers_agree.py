"""PNDM and Heun decide as DDIM does, within one observation: the rule runs once per noise level, not once per row."""

from __future__ import annotations

import math
from dataclasses import replace

import diffusers
import pytest
import torch

import fastguard
from fastguard.testbed import load, policy_path, prompts

PROMPTS = [p.prompt for p in prompts("D", "tuning")[:12]]
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
    "dtp": fastguard.policy("dtp"),
    "own": fastguard.policy(policy_path(), gate=None),
    "drop": fastguard.policy("dtp", rule="drop", magnitude="x0", deadline=None),
}


@pytest.fixture(scope="module", params=POLICIES)
def rule(request):
    return POLICIES[request.param]


@pytest.fixture(scope="module")
def ddim(rule):
    return decisions("ddim", rule)


def apart(a, b) -> float:
    """Observations between two transitions; one that never fired is infinitely late."""
    late = [-math.inf if r.transition_timestep is None else r.transition_timestep for r in (a, b)]
    return 0.0 if late[0] == late[1] else abs(late[0] - late[1]) / 20


@pytest.mark.parametrize("name", ["pndm", "heun"])
def test_decides_as_ddim(name, rule, ddim):
    """Each prompt within one observation; under the drop rule one in six may be two observations apart.

    Its statistic falls by a few percent a row here, and three samplers draw three slightly different curves.
    """
    differ = [apart(a, b) for a, b in zip(ddim, decisions(name, rule), strict=True) if apart(a, b) > 1]
    assert len(differ) <= (len(PROMPTS) // 6 if rule.rule == "drop" else 0), differ
    assert max(differ, default=0) <= 2
    assert sum(a.transition_timestep is not None for a in ddim) >= len(PROMPTS) // 2, "the rule hardly fired"


def test_rows_instead_of_noise_levels_would_misfire(monkeypatch):
    """What the agreement rests on: with every row as an observation Heun fires within its first rows, at a mid-stage."""
    import fastguard.schedule as module

    original = module.compile_schedule

    def every_row(*args, **kwargs):
        schedule = original(*args, **kwargs)
        rows = schedule.rows.clone()
        rows[:-1, module.Row.OBSERVE] = 1.0
        return replace(schedule, rows=rows)

    monkeypatch.setattr("fastguard.scheduling.compile_schedule", every_row)
    rows = [r.transition_step for r in decisions("heun", fastguard.policy("paper-dtp"))]
    assert sum(k is not None and k <= 6 for k in rows) > len(rows) // 2
