"""Schedulers that no table describes: what is refused and why, and what their rows hold all the same."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from fastguard.kernels.layout import Row
from fastguard.schedules.compiler import compile_schedule
from tests.schedules.cases import DDIM, SD_BETAS, Case, column


class Squared(diffusers.DDIMScheduler):
    fastguard_linear = True  # which is not so

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output + 1e-3 * sample**2, timestep, sample, **kwargs)


class Shifted(diffusers.DDIMScheduler):
    fastguard_linear = True  # which is not so

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output + 0.01, timestep, sample, **kwargs)


class DrawsTwice(diffusers.DDIMScheduler):
    fastguard_linear = True  # which is not so

    def step(self, model_output, timestep, sample, **kwargs):
        noise = torch.randn(sample.shape) - torch.randn(sample.shape)
        return super().step(model_output + noise, timestep, sample, **kwargs)


class DrawsLike(diffusers.DDIMScheduler):
    fastguard_linear = True  # which is not so

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output + torch.randn_like(sample), timestep, sample, **kwargs)


class Remembers(diffusers.DDIMScheduler):
    fastguard_linear = True  # which is not so

    """Looks five outputs back."""

    def step(self, model_output, timestep, sample, **kwargs):
        self.kept = [*getattr(self, "kept", []), model_output]
        return super().step(sum(self.kept[-6:]), timestep, sample, **kwargs)


def foreign(kind):
    scheduler = kind(**SD_BETAS, clip_sample=False)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (Case("DDIM").make(10), "clip_sample=True"),
        (Case("DDPM").make(10), "clip_sample=True"),
        (Case("DDIM", {"clip_sample": False, "thresholding": True}).make(10), "thresholding=True"),
        (Case("UniPCMultistep", {"thresholding": True}).make(10), "thresholding=True"),
        (Case("PNDM").make(10), "Runge-Kutta"),
        (Case("UniPCMultistep", {"solver_type": "bh1"}).make(10), "not finite at row 9"),
        (
            Case("DPMSolverSinglestep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}).make(9),
            "more than one tensor",
        ),
        (
            Case("DDPM", {"clip_sample": False, "variance_type": "learned"}).make(10),
            "step failed at row 0",
        ),
        (foreign(Squared), "not linear"),
        (foreign(Shifted), "not linear"),
        (foreign(DrawsTwice), "draws noise 2 times"),
        (foreign(DrawsLike), "draws random numbers by randn_like"),
        (foreign(Remembers), "5 remembered tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused(scheduler, reason):
    before = torch.get_rng_state()
    schedule = compile_schedule(scheduler)
    assert torch.equal(before, torch.get_rng_state())
    assert not schedule.linear
    assert reason in schedule.reason
    assert schedule.form == "own step" and schedule.history == 0
    assert schedule.draws == (0,) * len(schedule.timesteps)
    passed = schedule.rows[:, [Row.P, Row.Q, Row.A, Row.B, Row.H0, Row.H1, Row.H2, Row.N, Row.STORE]]
    assert passed.eq(torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, -1.0])).all()
    np.testing.assert_array_equal(column(schedule, Row.TIMESTEP), scheduler.timesteps.double())
    assert column(schedule, Row.OBSERVE).any()


def test_own_step_rows_keep_what_does_not_depend_on_the_update():
    linear = compile_schedule(Case("EulerDiscrete").make(10))
    own = linear.with_own_step("asked for")
    kept = [Row.S, Row.TIMESTEP, Row.OBSERVE, Row.W_EPSILON, Row.W_X0, Row.ACTIVE]
    assert torch.equal(own.rows[:, kept], linear.rows[:, kept])
    assert not own.linear and own.reason == "asked for" and own.rows[:-1, Row.Q].eq(1).all()
    assert linear.linear and linear.rows[:-1, Row.A].ne(0).any()


def test_step_arguments_that_are_no_numbers_are_refused():
    noise = torch.zeros(1, 4, 8, 8)
    schedule = compile_schedule(DDIM.make(10), step_kwargs={"variance_noise": noise})
    assert not schedule.linear
    assert schedule.reason == "step argument variance_noise is a Tensor, not a number"
