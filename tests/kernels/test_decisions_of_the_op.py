"""Whole generations through the op on latents of one element, so that the drawn curve is the d curve: plateaus, NaN, infinity, gate,
deadline, per-sample policies and schedules with rows that are no observations. Decisions must equal the float64 reference exactly."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastguard.kernels.arguments import Operands
from fastguard.kernels.guided_step import guided_step, history_for
from fastguard.kernels.layout import NEVER, Magnitude, Phase, Row, Rule, RuleKind, State

from . import reference

# Few different values, so that plateaus, ties with the gate and exact minima are common; squares of them are exact or not.
LEVELS = [0.0, 0.1, 0.5, 1.0, 1.0000001, 1.5, 2.0, 3.0, 1e-30, 1e25, math.nan, math.inf]


@st.composite
def generations(draw):
    steps = draw(st.integers(1, 12))
    batch = draw(st.integers(1, 6))
    deltas = draw(
        st.lists(st.lists(st.sampled_from(LEVELS), min_size=steps, max_size=steps), min_size=batch, max_size=batch)
    )
    observe = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0]), min_size=steps, max_size=steps))
    weights = draw(st.lists(st.sampled_from([0.25, 0.3, 1.0, 4.0]), min_size=2 * steps, max_size=2 * steps))
    rules = [
        [
            float(draw(st.sampled_from(RuleKind))),
            float(draw(st.sampled_from([0, 2, 4, NEVER]))),
            draw(st.sampled_from([0.25, 1.0, 2.25, 9.0])),
            float(draw(st.integers(0, 3))),
            float(draw(st.integers(0, 3))),
            draw(st.sampled_from([1.0, 0.9, 0.5, 0.0])),
            draw(st.sampled_from([0.3, 0.5, 1.0])),
            float(draw(st.sampled_from(Magnitude))),
            *[0.0] * (len(Rule) - Rule.COMBINED),
        ]
        for _ in range(batch)
    ]
    phases = [float(draw(st.sampled_from([Phase.PLAIN, Phase.UNDECIDED, Phase.BEFORE]))) for _ in range(batch)]
    return np.array(deltas, dtype=np.float32), observe, weights, np.array(rules), phases


def first_state(phases):
    state = np.zeros((len(phases), len(State)))
    state[:, State.PHASE] = phases
    state[:, [State.LAST, State.BEFORE_LAST, State.MARGIN]] = math.nan
    state[:, [State.MAXIMUM, State.GATE_D]] = -math.inf
    state[:, [State.LAST_ROW, State.TRANSITION_STEP, State.MINIMUM_STEP, State.GATE_STEP, State.NON_FINITE]] = -1
    return state


def play_and_check(deltas, observe, weights, rules, phases, backend):
    batch, steps = deltas.shape
    rows = np.zeros((steps + 1, len(Row)))
    rows[:steps, [Row.Q, Row.B, Row.S, Row.ACTIVE]] = 1
    rows[:steps, Row.OBSERVE] = observe
    rows[:steps, Row.W_EPSILON], rows[:steps, Row.W_X0] = weights[:steps], weights[steps:]
    rows[:, Row.STORE] = -1
    guidance = np.tile(np.array([-2.0, 7.5], np.float32), (batch, steps, 1))
    x = torch.zeros(batch, 1, 1, 1)
    state, trace = torch.from_numpy(first_state(phases)), torch.zeros(steps, batch)
    want = first_state(phases)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(steps):
            tables = (torch.from_numpy(table) for table in (rows, rules, guidance))
            outputs = torch.zeros_like(x), torch.from_numpy(deltas[:, k]).reshape(x.shape)
            guided_step(Operands(*outputs, x, history_for(x, 0), None, trace, state, *tables), backend)
            for b in range(batch):
                d = deltas[b, k] * deltas[b, k]
                want[b], column = reference.decide(want[b], rules[b], rows[k], float(d))
                np.testing.assert_array_equal(trace[k, b].numpy(), d)
                if math.isfinite(deltas[b, k]):
                    assert x[b].item() == guidance[b, k, column] * deltas[b, k]
    np.testing.assert_array_equal(state.numpy(), want)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(generations())
def test_decisions_equal_the_reference(generation):
    play_and_check(*generation, backend="torch")


def random_generation(seed, batch=16, steps=7):
    rng = np.random.default_rng(seed)
    rules = np.stack(
        [
            rng.choice([float(kind) for kind in RuleKind], batch),
            rng.choice([2.0, 6.0, NEVER], batch),
            rng.choice([0.25, 1.0, 2.25], batch),
            rng.integers(0, 4, batch).astype(float),
            rng.integers(0, 3, batch).astype(float),
            rng.choice([1.0, 0.9, 0.5], batch),
            rng.choice([0.3, 0.5], batch),
            rng.choice([float(magnitude) for magnitude in Magnitude], batch),
            *np.zeros((len(Rule) - Rule.COMBINED, batch)),
        ],
        axis=1,
    )
    deltas = rng.choice(np.array(LEVELS, np.float32), (batch, steps))
    phases = rng.choice([float(Phase.PLAIN), float(Phase.UNDECIDED), float(Phase.BEFORE)], batch)
    return deltas, rng.choice([0.0, 1.0, 1.0], steps), rng.choice([0.25, 0.3, 1.0, 4.0], 2 * steps), rules, phases
