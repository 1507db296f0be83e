"""The guided step once more: float64, numpy, one sample and one `if` at a time, written from the contract alone.

Shares with `kernels/guided_step.py` nothing but the names of the tables' columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastguard.kernels.layout import Magnitude, Phase, Row, Rule, RuleKind, State


@dataclass
class Expected:
    """What one sample must look like after the step. `*_error` bounds the rounding of float32 arithmetic, element by element:
    the sum of the magnitudes of all intermediate terms, in units of float32's half ulp at that magnitude."""

    state: np.ndarray
    active: bool
    x: np.ndarray | None = None
    m: np.ndarray | None = None
    y: np.ndarray | None = None
    x_size: np.ndarray | None = None
    m_size: np.ndarray | None = None
    y_size: np.ndarray | None = None
    share: float = math.nan
    anchor: tuple | None = None  # m and mu, if this row writes them
    store: int = -1
    timestep: float = math.nan


def squared_norm(uncond: np.ndarray, cond: np.ndarray) -> float:
    difference = cond.astype(np.float64) - uncond.astype(np.float64)
    return float((difference.astype(np.float64) ** 2).sum())


def decide(state: np.ndarray, rule: np.ndarray, row: np.ndarray, d: float | None) -> tuple[np.ndarray, int]:
    """New state and the guidance column, from the description in docs/policies.md. d is None where one branch ran."""
    s = {name: float(state[column]) for name, column in State.__members__.items()}
    k = s["STEP"]
    if d is not None:
        if not math.isfinite(d) and s["NON_FINITE"] < 0:
            s["NON_FINITE"] = k
        if row[Row.OBSERVE]:
            j = s["OBSERVATIONS"]
            weight = {Magnitude.OUTPUT: 1.0, Magnitude.EPSILON: row[Row.W_EPSILON], Magnitude.X0: row[Row.W_X0]}
            statistic = d * float(weight[Magnitude(int(rule[Rule.MAGNITUDE]))])
            if s["PHASE"] == Phase.UNDECIDED and j < rule[Rule.GATE_STEPS]:
                if d > s["GATE_D"]:
                    s["GATE_D"] = d
                if d >= rule[Rule.GATE]:
                    s["PHASE"], s["GATE_STEP"] = Phase.BEFORE, k
                elif j + 1 >= rule[Rule.GATE_STEPS]:
                    s["PHASE"] = Phase.PLAIN
            if s["PHASE"] == Phase.BEFORE and rule[Rule.KIND] == RuleKind.MINIMUM:
                last, before = s["LAST"], s["BEFORE_LAST"]
                dip = j >= 2 and last < before and last < statistic
                deep = j >= 2 and last < rule[Rule.FLOOR] * s["MAXIMUM"]
                if dip and deep and j - 1 >= rule[Rule.MIN_STEP]:
                    s["MINIMUM_STEP"] = s["LAST_ROW"]
                    s["MARGIN"] = 1 - last / min(before, statistic)
                    s["PHASE"], s["TRANSITION_STEP"] = Phase.AFTER, k
            elif s["PHASE"] == Phase.BEFORE and rule[Rule.KIND] == RuleKind.DROP:
                peak = statistic if statistic > s["MAXIMUM"] else s["MAXIMUM"]
                if j >= rule[Rule.MIN_STEP] and statistic < rule[Rule.RHO] * peak:
                    s["MARGIN"] = 1 - statistic / (rule[Rule.RHO] * peak)
                    s["PHASE"], s["TRANSITION_STEP"] = Phase.AFTER, k
            if statistic > s["MAXIMUM"]:
                s["MAXIMUM"] = statistic
            s["BEFORE_LAST"], s["LAST"], s["LAST_ROW"], s["OBSERVATIONS"] = s["LAST"], statistic, k, j + 1
    if s["PHASE"] == Phase.BEFORE and k >= rule[Rule.SWITCH_ROW]:
        s["PHASE"], s["TRANSITION_STEP"] = Phase.AFTER, k
        if rule[Rule.KIND] != RuleKind.NONE:
            s["FORCED"] = 1.0
    column = 0 if s["PHASE"] == Phase.BEFORE else 1
    s["STEP"] = k + 1
    return np.array([float(s[name]) for name in State.__members__]), column


def anchored(
    s: dict, rule: np.ndarray, row: np.ndarray, k: int, g: float, output: np.ndarray, combined: np.ndarray | None,
    u: np.ndarray, c: np.ndarray, x: np.ndarray, m: np.ndarray, mu: np.ndarray,
):  # fmt: skip
    """What anchored guidance makes of `output` = u + g (c - u), or of the caller's own combination: in x0 space, as it is described.

    s is the state after the decision, by column, and is changed. Returns (output, its rounding beyond output's own, share, anchor to write).
    """
    X, E = float(row[Row.X]), float(row[Row.E])
    u0, c0 = X * x + E * u, X * x + E * c
    write = None
    if s["ANCHOR"] == 0:
        m, mu, write = c0, u0, (c0, u0)
        s["LENGTH"] = math.sqrt(((c0 - u0) ** 2).sum())
    elif row[Row.OBSERVE] and s["ANCHOR"] == 1:
        U, M = u0 - mu, m - mu
        v = 2 * float((U * M).sum()) / float((U**2).sum() + (M**2).sum())
        s["PUSH"] = min(max(s["PUSH"] + rule[Rule.ETA] * (v - rule[Rule.DRIFT]), 0), rule[Rule.MOST])
    a, d0 = m - u0, c0 - u0
    p = float((d0 * a).sum() / (a**2).sum())
    if not np.isfinite(a).all() or s["ANCHOR"] == 2:
        if s["NON_FINITE"] < 0:
            s["NON_FINITE"] = k
        s["ANCHOR"] = 2
        return (output if s["PHASE"] == Phase.UNDECIDED else u), np.abs(u), math.nan if math.isnan(p) else p, write
    s["ANCHOR"] = 1
    if s["PHASE"] == Phase.UNDECIDED:
        return output, 0 * u, p, write
    strength = min(max((s["LENGTH"] - rule[Rule.FAINT]) / (rule[Rule.SHARP] - rule[Rule.FAINT]), 0), 1)
    g_a = (1 - strength) - rule[Rule.BACK] * max(g, 0) * strength - s["PUSH"]
    along = float(((output - u) * E * a).sum() / (a**2).sum()) if combined is not None else g * p  # in x0
    f = max(along - g_a * p, 0) if p > 0 else 0.0
    error = (abs(g) + abs(g_a)) * np.abs(d0 * a).sum() / (a**2).sum() + abs(f)
    if combined is not None:
        error += np.abs((output - u) * E * a).sum() / (a**2).sum()
    a_size = np.abs(m) + np.abs(X * x) + np.abs(E * u)
    more = 40 * (error * np.abs(a) + (f + error * 1e-3) * a_size) / abs(E)
    added = output - f / E * a - u
    size, terms = float((added**2).sum()), float(((output - u) ** 2).sum()) + (f / E) ** 2 * float((a**2).sum())
    shorter = s["LENGTH"] / (strength * abs(E) * math.sqrt(size)) if strength * size > 0 else 1.0
    if shorter >= 1:
        return u + added, more, p, write
    return u + shorter * added, more + 20 * terms / size * shorter * np.abs(added), p, write


def step(
    b: int,
    uncond: np.ndarray,
    cond: np.ndarray | None,
    *,
    x: np.ndarray,
    history: np.ndarray,
    state: np.ndarray,
    rows: np.ndarray,
    rules: np.ndarray,
    guidance: np.ndarray,
    noise: np.ndarray | None,
    combined: np.ndarray | None = None,
    anchor: np.ndarray | None = None,
    d: float | None,
) -> Expected:
    """Sample b of a batch, all arrays as before the step. `d` is the float32 d that the implementation found, so that its rounding
    (checked on its own) cannot flip a decision here."""
    row = rows[int(state[b, State.BASE] + state[b, State.STEP])]
    if not row[Row.ACTIVE]:
        return Expected(state[b].copy(), active=False)
    following = rows[int(state[b, State.BASE] + state[b, State.STEP]) + 1]
    new_state, column = decide(state[b], rules[b], row, d)

    u, latent = uncond[b].astype(np.float64), x[b].astype(np.float64)
    e, e_size = u, np.abs(u)
    if cond is not None:
        g = float(guidance[b, int(state[b, State.STEP]), column])
        delta = cond[b].astype(np.float64) - u
        e, e_size = u + g * delta, np.abs(u) + 3 * abs(g) * np.abs(delta)

    if combined is not None and column == 1 and rules[b, Rule.COMBINED]:
        e = combined[b].astype(np.float64)
        e_size = np.abs(e)
    else:
        combined = None
    share, written = math.nan, None
    s = {name: float(new_state[at]) for name, at in State.__members__.items()}
    if anchor is not None and cond is not None and rules[b, Rule.ANCHORED] and s["PHASE"] != Phase.PLAIN:
        own = None if combined is None else e
        e, more, share, written = anchored(
            s, rules[b], row, int(state[b, State.STEP]), float(guidance[b, int(state[b, State.STEP]), column]), e, own,
            u, cond[b].astype(np.float64), latent, anchor[0, b].astype(np.float64), anchor[1, b].astype(np.float64),
        )  # fmt: skip
        e_size = e_size + more
        new_state = np.array([s[name] for name in State.__members__])

    total_m, total_m_size = _weigh([(row[Row.P], latent, np.abs(latent)), (row[Row.Q], e, e_size)])
    terms = [(row[Row.A], latent, np.abs(latent)), (row[Row.B], total_m, total_m_size)]
    terms += [(row[Row.H0 + slot], history[slot, b], np.abs(history[slot, b])) for slot in range(len(history))]
    if noise is not None:
        terms.append((row[Row.N], noise[b], np.abs(noise[b])))
    total_x, total_x_size = _weigh(terms)
    scale = following[Row.S]
    return Expected(
        new_state,
        active=True,
        x=total_x,
        m=total_m,
        y=scale * total_x,
        x_size=total_x_size,
        m_size=total_m_size,
        y_size=np.abs(scale) * total_x_size,
        share=share,
        anchor=written,
        store=int(row[Row.STORE]),
        timestep=float(following[Row.TIMESTEP]),
    )


def _weigh(terms: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    total, size = 0.0, 0.0
    for weight, value, value_size in terms:
        if weight != 0:
            total = total + float(weight) * value.astype(np.float64)
            size = size + abs(float(weight)) * value_size.astype(np.float64)
    return np.broadcast_to(total, terms[0][1].shape), np.broadcast_to(size, terms[0][1].shape)
