"""X and E of every row: the x0-prediction that the model's output means there, against the schedulers themselves."""

from __future__ import annotations

import logging

import diffusers
import numpy as np
import pytest
import torch

from bench import schedulers_page
from fastguard.kernels.layout import Row
from fastguard.schedules import noise_level
from fastguard.schedules.compiler import compile_schedule

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
LARGEST = 1e-6  # relative to the terms of the sum
STEPS = 10
VELOCITY_OF_FLOW = "FlowMatch"


def scheduler(name, options, kind=None):
    betas = {} if name.startswith(("Flow", "EDM", "IPNDM")) else schedulers_page.SD
    extra = {} if kind is None else {"prediction_type": kind}
    if kind == "flow_prediction":
        extra["use_flow_sigmas"] = True
    made = getattr(diffusers, name + "Scheduler")(**{**betas, **options, **extra})
    made.set_timesteps(STEPS)
    return made


def cases():
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    for what, name, options, step in schedulers_page.SCHEDULERS:
        fixed = name.startswith(("Flow", "IPNDM")) or "prediction_type" in options
        for kind in (None,) if fixed else KINDS:
            if name.startswith("EDM") and kind in ("sample", "flow_prediction"):
                continue
            try:
                made = scheduler(name, options, kind)
                if kind == "flow_prediction" and ("use_flow_sigmas" not in made.config or name == "SASolver"):
                    continue
                made.step(torch.zeros(1, 1, 1, 1), made.timesteps[0], torch.zeros(1, 1, 1, 1))
            except (ValueError, NotImplementedError, TypeError):
                continue  # the class knows no such prediction
            yield pytest.param(name, options, step, kind, id=f"{what}, {kind or 'its own'}")


CASES = list(cases())


def outputs(made, x0, n, x, level, kind):
    """The exact output of a model at (x0, n), from what each prediction is defined as."""
    if hasattr(made, "precondition_outputs"):
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        sigma = torch.tensor([level], dtype=torch.float64)
        skip, out = made.precondition_outputs(one, zero, sigma), made.precondition_outputs(zero, one, sigma)
        return (x0 - skip * x) / out
    if isinstance(made, diffusers.IPNDMScheduler):
        k = int((made.timesteps.double() - level).abs().argmin())
        return made.alphas[k].double() * n - made.betas[k].double() * x0
    if type(made).__name__.startswith(VELOCITY_OF_FLOW) or kind == "flow_prediction":
        return n - x0
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        has_sigmas = getattr(made, "sigmas", None) is not None
        s = (
            level
            if has_sigmas
            else ((1 - made.alphas_cumprod.double()[int(level)]) / made.alphas_cumprod.double()[int(level)]) ** 0.5
        )
        return (n - s * x0) / (1 + s**2) ** 0.5
    return n


def deviation(name, options, step, kind):
    """Largest |X x + E e - x0| over observed rows, relative to the terms, with x from the scheduler's own add_noise."""
    made = scheduler(name, options, kind)
    rows = compile_schedule(made, step_kwargs=step).rows[:-1]
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for k, row in enumerate(rows.tolist()):
        if not row[Row.OBSERVE]:
            continue
        x0, n = torch.randn(2, 64, dtype=torch.float64, generator=generator)
        fresh = scheduler(name, options, kind)
        t = fresh.timesteps[k][None]
        if isinstance(made, diffusers.IPNDMScheduler):  # it adds no noise
            x = fresh.alphas[k].double() * x0 + fresh.betas[k].double() * n
        else:
            x = fresh.add_noise(x0, n, t) if hasattr(fresh, "add_noise") else fresh.scale_noise(x0, t, n)
        level = float(fresh.sigmas[k]) if getattr(fresh, "sigmas", None) is not None else float(t)
        e = outputs(fresh, x0, n, x, level, kind or fresh.config.get("prediction_type", "epsilon"))
        terms = row[Row.X] * x, row[Row.E] * e
        size = 1 + terms[0].abs() + terms[1].abs()
        off = float(((sum(terms) - x0).abs() / size).max())
        assert np.isfinite(off)
        worst = max(worst, off)
    return worst


@pytest.mark.parametrize(("name", "options", "step", "kind"), CASES)
def test_the_exact_output_gives_x0(name, options, step, kind):
    assert deviation(name, options, step, kind) < LARGEST


def test_every_scheduler_of_the_table_and_every_prediction_is_tried():
    names = {case.values[0] for case in CASES}
    assert names == {name for _, name, _, _ in schedulers_page.SCHEDULERS}
    assert {case.values[3] for case in CASES} == {None, *KINDS}
    assert len(CASES) > 80


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "EulerDiscrete", "LMSDiscrete"]
)
def test_mid_stages_predict_as_the_scheduler_does(name, kind):
    """These say what they take for x0 at every evaluation, mid-stages too."""
    made = scheduler(name, {}, kind)
    rows = compile_schedule(made).rows[:-1]
    generator = torch.Generator().manual_seed(0)
    for t, row in zip(made.timesteps, rows.tolist(), strict=True):
        x, e = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64, generator=generator)
        made.scale_model_input(x, t)
        theirs = made.step(e, t, x).pred_original_sample
        torch.testing.assert_close(row[Row.X] * x + row[Row.E] * e, theirs, rtol=1e-5, atol=1e-5)
    assert not all(row[Row.OBSERVE] for row in rows) or name in ("EulerDiscrete", "LMSDiscrete")


SOLVERS = ["DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "SASolver"]


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in SOLVERS for k in KINDS if (n, k) != ("SASolver", "flow_prediction")]
)
def test_solvers_convert_to_the_same_x0(name, kind, monkeypatch):
    made = scheduler(name, {}, kind)
    rows = compile_schedule(made).rows[:-1].tolist()
    generator = torch.Generator().manual_seed(0)
    convert, seen = made.convert_model_output, []
    monkeypatch.setattr(made, "convert_model_output", lambda *a, **k: seen.append(convert(*a, **k)) or seen[-1])
    for t, row in zip(made.timesteps, rows, strict=True):
        x, e = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64, generator=generator)
        made.step(e, t, x)
        torch.testing.assert_close(row[Row.X] * x + row[Row.E] * e, seen[-1], rtol=1e-5, atol=1e-5)


DPM = ("DPMSolverMultistep", {}, {}, "epsilon")


def test_planted_sigma_formula_under_dpm_is_found(monkeypatch):
    """Its sigmas are no latents' signal and noise: it keeps the variance."""
    monkeypatch.setattr(noise_level, "signal_and_noise", lambda scheduler, levels: (np.ones_like(levels), levels))
    schedule = compile_schedule.__globals__["_compile"](scheduler(DPM[0], {}, "epsilon"), {}, 0)
    assert schedule.rows[:-1, Row.X].isnan().all(), "add_noise is asked, so the rows have none rather than wrong ones"
    monkeypatch.setattr(noise_level, "unknown", lambda *_: None)
    monkeypatch.setattr("fastguard.schedules.compiler.unknown", lambda *_: None)
    monkeypatch.setattr("fastguard.schedules.compiler._cache", {})
    assert deviation(*DPM) > 0.1


def test_planted_wrong_sign_is_found(monkeypatch):
    true = noise_level.predictions
    monkeypatch.setattr("fastguard.schedules.compiler._cache", {})
    monkeypatch.setattr(
        "fastguard.schedules.compiler.predictions",
        lambda *a: [part * sign for part, sign in zip(true(*a), (1, -1, 1), strict=True)],
    )
    assert deviation(*DPM) > 0.1


def test_unknown_where_x0_does_not_exist():
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    rows = compile_schedule(scheduler("DDIM", zero_snr, "epsilon")).rows
    assert rows[0, Row.X].isnan() and not rows[1, Row.X].isnan()
    assert not compile_schedule(scheduler("DDIM", zero_snr, "v_prediction")).rows[:-1, Row.X].isnan().any()


def test_unknown_where_a_scheduler_adds_noise_otherwise_than_it_steps():
    """SA-Solver with flow sigmas: its add_noise takes them for timesteps of its betas."""
    assert compile_schedule(scheduler("SASolver", {}, "flow_prediction")).rows[:-1, Row.X].isnan().all()


class Foreign(diffusers.DDIMScheduler):
    """Thresholds far beyond what a probe reaches, and records what it sees."""

    def step(self, model_output, timestep, sample, **kwargs):
        self.__dict__.setdefault("seen", []).append(float(sample.abs().max()))
        return super().step(model_output, timestep, sample.clamp(-1e6, 1e6), **kwargs)


class Registered(Foreign):
    fastguard_linear = True


def test_a_foreign_class_runs_its_own_step_and_is_not_probed():
    made = Foreign(clip_sample=False)
    made.set_timesteps(STEPS)
    made.seen = []
    schedule = compile_schedule(made)
    assert not schedule.linear and "Foreign is not diffusers' own" in schedule.reason and made.seen == []
    assert schedule.rows[:-1, Row.X : Row.E + 1].isnan().all()
    assert schedule.rows[:-1, Row.OBSERVE].all(), "the guard's decisions need no step()"


def test_a_foreign_class_may_register_as_linear():
    made = Registered(clip_sample=False)
    made.set_timesteps(STEPS)
    schedule = compile_schedule(made)
    assert schedule.linear and not schedule.rows[:-1, Row.X].isnan().any()


def test_registration_is_not_inherited():
    class Later(Registered):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    made = Later(clip_sample=False)
    made.set_timesteps(STEPS)
    assert not compile_schedule(made).linear
