"""Policies lowered to tables: rules, guidance, first state, branches."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastguard.kernels.layout import NEVER, Magnitude, Phase, Rule, RuleKind, State
from fastguard.policies.plan import gate_threshold, lower
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import tables

NAN, INF = math.nan, math.inf
TIMES = list(range(981, 0, -20))  # the 50 timesteps of DDIM on the default grid


def plan(*policies, timesteps=TIMES, observe=None, guidance_scale=7.5, elements=4096):
    return lower(list(policies), tables.schedule(timesteps, observe), guidance_scale, elements)


def test_static_needs_one_branch_before_t_star():
    """stp at t* = 500: 25 of 50 rows with the unconditional branch alone, 0.75 of plain guidance's denoiser rows."""
    branches = plan(policy("stp"), policy("stp", guidance_scale=3)).branches
    assert branches == ("uncond",) * 25 + ("both",) * 25
    assert plan(policy("stp", before="conditional")).branches == ("cond",) * 25 + ("both",) * 25
    assert plan(policy("stp"), policy("stp", before="conditional")).branches == ("both",) * 50
    assert plan(policy("stp"), policy("stp", t_star=700)).branches == ("uncond",) * 15 + ("both",) * 35
    for other in (policy("cfg"), policy("dtp"), policy("og+stp")):
        assert plan(policy("stp"), other).branches == ("both",) * 50
    for fields in ({"monitor": True}, {"gate": 0.1}):
        assert plan(policy("stp", **fields)).branches == ("both",) * 50


def test_interval_needs_one_branch_outside():
    interval = (1.0,) * 10 + (7.5,) * 20 + (0.0,) * 20
    assert plan(policy("cfg", guidance_scale=interval)).branches == ("cond",) * 10 + ("both",) * 20 + ("uncond",) * 20
    assert plan(policy("dtp", guidance_scale=interval)).branches == ("both",) * 50
    assert plan(policy("cfg", guidance_scale=interval, monitor=True)).branches == ("both",) * 50


def test_guidance():
    schedule = tuple(float(k) for k in range(50))
    table = plan(
        policy("cfg"),
        policy("dtp"),
        policy("released-dtp", guidance_scale=3.0),
        policy("og+dtp", guidance_scale=schedule, opposite_steps=4),
        policy("og+stp"),
        policy("og+stp", opposite_steps=2),
    ).guidance
    assert table.dtype == torch.float32
    assert table[0, :, 1].tolist() == table[1, :, 1].tolist() == [7.5] * 50
    assert table[1, :, 0].tolist() == [0.0] * 50
    assert table[2].tolist() == [[1.0, 3.0]] * 50
    assert table[3, :, 0].tolist() == [0.0, -1.0, -2.0, -3.0] + [0.0] * 46
    assert table[3, :, 1].tolist() == list(schedule)
    assert table[4].tolist() == [[-2.0, 7.5]] * 50
    assert table[5, :, 0].tolist() == [-2.0] * 2 + [0.0] * 48


def test_switch_rows():
    """The first OBSERVING row at or below t*: Heun's and PNDM's second evaluations of a noise level do not count."""
    times = [900, 700, 700, 500, 500, 300, 300]
    observe = [True, True, False, False, True, True, False]
    stop = [policy("stp", t_star=t) for t in (950, 900, 700, 500, 499, 300, 299)]
    rules = plan(*stop, timesteps=times, observe=observe).rules
    assert rules[:, Rule.SWITCH_ROW].tolist() == [0, 0, 1, 4, 5, 5, NEVER]
    assert rules[:, Rule.KIND].tolist() == [RuleKind.NONE] * 7
    rules = plan(
        policy("dtp", deadline=300), policy("paper-dtp"), policy("cfg"), timesteps=times, observe=observe
    ).rules
    assert rules[:, Rule.SWITCH_ROW].tolist() == [5, NEVER, NEVER]
    assert rules[:, Rule.KIND].tolist() == [RuleKind.MINIMUM, RuleKind.MINIMUM, RuleKind.NONE]


def test_rule_and_state_tables():
    made = Policy(
        transition="dynamic",
        rule="drop",
        rho=0.25,
        magnitude="x0",
        gate=0.5,
        gate_steps=3,
        min_step=4,
    )
    tables = plan(made, policy("dtp", min_drop=0.1, magnitude="epsilon"), policy("cfg"))
    rule, state = tables.rules, tables.state
    assert rule.dtype == state.dtype == torch.float64
    assert rule[0, Rule.KIND] == RuleKind.DROP
    assert rule[0, Rule.MAGNITUDE] == Magnitude.X0
    assert rule[0, Rule.RHO] == 0.25
    assert rule[0, Rule.GATE] == 0.25 * 4096
    assert rule[0, Rule.GATE_STEPS] == 3
    assert rule[0, Rule.MIN_STEP] == 4
    assert rule[1, Rule.FLOOR] == 0.9
    assert rule[1, Rule.MAGNITUDE] == Magnitude.EPSILON
    assert rule[1, Rule.GATE_STEPS] == 0
    assert state[:, State.PHASE].tolist() == [Phase.UNDECIDED, Phase.BEFORE, Phase.PLAIN]
    assert state[:, State.MAXIMUM].tolist() == state[:, State.GATE_D].tolist() == [-INF] * 3
    assert state[:, [State.LAST, State.BEFORE_LAST, State.MARGIN]].isnan().all()
    never = [
        State.TRANSITION_STEP,
        State.MINIMUM_STEP,
        State.GATE_STEP,
        State.NON_FINITE,
        State.LAST_ROW,
    ]
    assert (state[:, never] == -1).all()
    assert (state[:, [State.STEP, State.BASE, State.OBSERVATIONS, State.FORCED]] == 0).all()


@given(st.floats(1e-300, 1e25), st.integers(1, 4 * 256 * 256))
def test_gate_threshold_is_the_smallest(tau, elements):
    """Comparing d with the threshold decides as comparing sqrt(d / elements) with tau in float64 does, at the very last float32."""
    d = np.float32(gate_threshold(tau, elements))
    below = np.nextafter(d, np.float32(-np.inf))
    assert math.sqrt(float(d) / elements) >= tau
    assert below < 0 or math.sqrt(float(below) / elements) < tau


def test_thresholds_grow_with_tau():
    thresholds = [gate_threshold(tau, 16384) for tau in np.linspace(0.01, 2, 500)]
    assert all(a < b for a, b in pairwise(thresholds))


def test_lower_refuses():
    with pytest.raises(ValueError, match="has 3 values: must be one per denoiser row, 50"):
        plan(policy("cfg", guidance_scale=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"policies\[0\] holds per-image lists"):
        plan(policy("dtp", gate=[0.1, 0.2]))
    with pytest.raises(ValueError, match="guidance_scale=nan"):
        plan(policy("cfg"), guidance_scale=NAN)
    with pytest.raises(ValueError, match="elements=0"):
        plan(policy("cfg"), elements=0)
