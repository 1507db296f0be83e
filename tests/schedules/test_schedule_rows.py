"""The table's other columns: observations, weights, inputs, draws."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fastguard.kernels.layout import HISTORY, Row
from fastguard.schedules.compiler import compile_schedule
from tests.schedules.cases import DDIM, Case, column


def observed(case, steps, **kwargs):
    return column(compile_schedule(case.make(steps), **kwargs), Row.OBSERVE).astype(int).tolist()


# Observations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "steps", "expected"),
    [
        (DDIM, 6, [1, 1, 1, 1, 1, 1]),
        (Case("DPMSolverMultistep"), 5, [1, 1, 1, 1, 1]),
        (Case("UniPCMultistep"), 5, [1, 1, 1, 1, 1]),
        # rows 1 and 2 are one noise level
        (Case("PNDM", {"skip_prk_steps": True}), 6, [1, 1, 0, 1, 1, 1, 1]),
        # a full step, its second stage, ... and a last full step
        (Case("HeunDiscrete"), 4, [1, 0, 1, 0, 1, 0, 1]),
        (Case("FlowMatchHeunDiscrete"), 4, [1, 0, 1, 0, 1, 0, 1]),
        (Case("KDPM2Discrete"), 4, [1, 0, 1, 0, 1, 0, 1]),
        (Case("KDPM2AncestralDiscrete"), 4, [1, 0, 1, 0, 1, 0, 1]),
        # solver orders 1 2 1 2 1 1 and 1 2 3 1 2 3 1 1: the last step, to sigma = 0, is always of order 1
        (Case("DPMSolverSinglestep"), 6, [1, 0, 1, 0, 1, 1]),
        (Case("DPMSolverSinglestep", {"solver_order": 3}), 8, [1, 0, 0, 1, 0, 0, 1, 1]),
        # three Runge-Kutta steps of four evaluations; the fourth is the second level too early, row 4 is its first true one
        (Case("PNDM"), 6, [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1]),
    ],
    ids=str,
)
def test_observations(case, steps, expected):
    assert observed(case, steps) == expected


def test_equal_timesteps_of_distinct_sigmas_are_distinct_observations():
    """Karras: the last sigmas round to the same timestep, yet each is its own noise level."""
    schedule = compile_schedule(Case("DPMSolverMultistep", {"use_karras_sigmas": True}).make(50))
    timesteps = column(schedule, Row.TIMESTEP)
    assert len(np.unique(timesteps)) < 50
    assert column(schedule, Row.OBSERVE).all()


def test_late_start_of_pndm_observes_every_row():
    """Stock's second row then takes two different timesteps for one; each is evaluated once, so each counts."""
    assert observed(Case("PNDM", {"skip_prk_steps": True}), 6, begin_index=3) == [1, 1, 1, 1]


# Weights -----------------------------------------------------------------------------------------


def alpha_bar(scheduler, timesteps):
    return scheduler.alphas_cumprod.double().numpy()[timesteps.astype(int)]


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "LCM", "PNDM", "TCD"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_of_timestep_schedulers(name, prediction):
    options = {"PNDM": {"skip_prk_steps": True}, "TCD": {}}.get(name, {"clip_sample": False})
    scheduler = Case(name, {**options, "prediction_type": prediction}).make(10)
    schedule = compile_schedule(scheduler)
    a = alpha_bar(scheduler, column(schedule, Row.TIMESTEP))
    one = np.ones_like(a)
    epsilon, x0 = {
        "epsilon": (one, (1 - a) / a),
        "v_prediction": (a, 1 - a),
        "sample": (a / (1 - a), one),
    }[prediction]
    np.testing.assert_allclose(column(schedule, Row.W_EPSILON), epsilon, rtol=1e-6)
    np.testing.assert_allclose(column(schedule, Row.W_X0), x0, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "LMSDiscrete",
        "HeunDiscrete",
        "SASolver",
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_of_sigma_schedulers(name, prediction):
    scheduler = Case(name, {"prediction_type": prediction}).make(10)
    schedule = compile_schedule(scheduler)
    squared = scheduler.sigmas.double().numpy()[: len(schedule.timesteps)] ** 2
    one = np.ones_like(squared)
    epsilon, x0 = {
        "epsilon": (one, squared),
        "v_prediction": (1 / (squared + 1), squared / (squared + 1)),
    }[prediction]
    np.testing.assert_allclose(column(schedule, Row.W_EPSILON), epsilon, rtol=1e-6)
    np.testing.assert_allclose(column(schedule, Row.W_X0), x0, rtol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        Case("FlowMatchEulerDiscrete", {"shift": 3.0}),
        Case("FlowMatchHeunDiscrete", {"shift": 3.0}),
        Case("UniPCMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        Case("DPMSolverMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
    ids=str,
)
def test_weights_of_flows(case):
    scheduler = case.make(10)
    schedule = compile_schedule(scheduler)
    sigma = scheduler.sigmas.double().numpy()[: len(schedule.timesteps)]
    np.testing.assert_allclose(column(schedule, Row.W_EPSILON), (1 - sigma) ** 2, rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(column(schedule, Row.W_X0), sigma**2, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_weights_of_edm_follow_its_output_preconditioning(name, prediction):
    scheduler = Case(name, {"prediction_type": prediction}).make(10)
    schedule = compile_schedule(scheduler)
    sigmas = scheduler.sigmas[:10]
    c_out = [float(scheduler.precondition_outputs(torch.zeros(1), torch.ones(1), sigma)) for sigma in sigmas.double()]
    np.testing.assert_allclose(column(schedule, Row.W_X0), np.square(c_out), rtol=1e-6)
    np.testing.assert_allclose(
        column(schedule, Row.W_EPSILON), np.square(c_out) / sigmas.double().numpy() ** 2, rtol=1e-6
    )


@pytest.mark.parametrize(
    "case",
    [
        DDIM,
        Case("DDIM", {"clip_sample": False, "prediction_type": "v_prediction"}),
        Case("EulerDiscrete"),
        Case("EulerDiscrete", {"prediction_type": "v_prediction"}),
        Case("HeunDiscrete"),
        Case("DDPM", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ],
    ids=str,
)
def test_x0_weight_is_the_square_of_what_stock_makes_of_an_output(case):
    """Without any formula: how far stock's pred_original_sample moves when the output moves by one."""
    scheduler, schedule = case.make(10), compile_schedule(case.make(10))
    x, zero, one = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    moved = []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        at_zero, at_one = (copy.deepcopy(scheduler).step(output, t, x).pred_original_sample for output in (zero, one))
        moved.append(float(at_one - at_zero) ** 2)
        scheduler.step(zero, t, x)
    np.testing.assert_allclose(column(schedule, Row.W_X0), moved, rtol=1e-5)


def test_ipndm_predicts_v():
    schedule = compile_schedule(Case("IPNDM").make(10))
    total = column(schedule, Row.W_EPSILON) + column(schedule, Row.W_X0)
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_zero_snr_has_no_x0_space_in_its_first_row():
    config = {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = compile_schedule(Case("DDIM", config).make(10))
    weights = column(schedule, Row.W_X0)
    assert np.isnan(weights[0]) and np.isfinite(weights[1:]).all()
    assert not schedule.linear and "not finite" in schedule.reason  # an epsilon model cannot start at alpha = 0
    assert compile_schedule(Case("DDIM", {**config, "prediction_type": "v_prediction"}).make(10)).linear


# Model input, last row ---------------------------------------------------------------------------


def test_input_scales():
    euler = Case("EulerDiscrete").make(10)
    sigma = euler.sigmas[:-1].double().numpy()
    np.testing.assert_allclose(column(compile_schedule(euler), Row.S), 1 / np.sqrt(sigma**2 + 1), rtol=1e-6)
    assert (column(compile_schedule(DDIM.make(10)), Row.S) == 1).all()
    assert (column(compile_schedule(Case("FlowMatchEulerDiscrete").make(10)), Row.S) == 1).all()


@pytest.mark.parametrize("case", [DDIM, Case("DDIM"), Case("UniPCMultistep")], ids=str)
def test_last_row_is_inactive(case):
    rows = compile_schedule(case.make(7)).rows
    assert rows.shape == (8, len(Row)) and rows.dtype == torch.float64
    assert rows[:-1, Row.ACTIVE].eq(1).all()
    last = rows[-1]
    assert (last[Row.ACTIVE], last[Row.S], last[Row.TIMESTEP], last[Row.STORE]) == (0, 1, 0, -1)


def test_pndm_holds_its_second_row():
    """Row 2 re-evaluates the level of row 1: row 1 is never stored, rows 2, 3 and 4 look back at 0, past it."""
    schedule = compile_schedule(Case("PNDM", {"skip_prk_steps": True}).make(20))
    store = column(schedule, Row.STORE)
    assert schedule.history == 3
    assert store[0] >= 0 and store[1] == -1
    slot = Row.H0 + int(store[0])
    assert schedule.rows[1:5, slot].ne(0).all()
    # 3 e_2 - e_0; 23 e_3 - 16 e_2 + 5 e_0; 55 e_4 - 59 e_3 + 37 e_2 - 9 e_0: Adams-Bashforth without row 1
    for row, ratios in ((2, [-1 / 3]), (3, [-16 / 23, 5 / 23]), (4, [-59 / 55, 37 / 55, -9 / 55])):
        weights = schedule.rows[row, Row.H0 : Row.H0 + HISTORY] / schedule.rows[row, Row.B]
        np.testing.assert_allclose(sorted(weights[weights != 0].tolist()), sorted(ratios), rtol=1e-5)


# Draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "draws"),
    [
        (DDIM, [0] * 5),
        (Case("DDIM", {"clip_sample": False}, {"eta": 0.5}), [1] * 5),
        (Case("DDPM", {"clip_sample": False}), [1, 1, 1, 1, 0]),
        (Case("LCM"), [1, 1, 1, 1, 0]),
        (Case("EulerDiscrete"), [0] * 5),
        (Case("EulerAncestralDiscrete"), [1] * 5),
        (Case("SASolver"), [1] * 5),
        (Case("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}), [1] * 5),
    ],
    ids=str,
)
def test_draws(case, draws):
    schedule = compile_schedule(case.make(5), step_kwargs=case.step)
    assert list(schedule.draws) == draws
    # SA-Solver and the last row of an ancestral sampler draw noise that they do not use
    assert all(draws[k] for k in np.flatnonzero(column(schedule, Row.N)))


@pytest.mark.parametrize("name", ["EulerAncestralDiscrete", "DPMSolverMultistep", "FlowMatchEulerDiscrete", "LCM"])
def test_noise_dtype_is_what_stock_draws_in_half_precision(name, monkeypatch):
    config = {
        "DPMSolverMultistep": {"algorithm_type": "sde-dpmsolver++"},
        "FlowMatchEulerDiscrete": {"stochastic_sampling": True},
    }.get(name, {})
    scheduler = Case(name, config).make(5)
    expected = compile_schedule(scheduler).noise_dtype or torch.float16
    asked = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: asked.append(k["dtype"]) or randn(*a, **k))
    half = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(half, scheduler.timesteps[0])
    scheduler.step(half, scheduler.timesteps[0], half, generator=torch.Generator())
    assert asked == [expected]
