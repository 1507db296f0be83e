"""Random guided steps in the middle of a generation, and the comparison of what came out with the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.arguments import Operands
from fastguard.kernels.guided_step import guided_step, history_for
from fastguard.kernels.layout import NEVER, Magnitude, Phase, Row, Rule, RuleKind, State

from . import reference

HALF_ULP = 2.0**-24  # of float32, relative
# How far a result may be from float64, in half ulps of the sum of its terms' magnitudes (reference.Expected.*_size):
# at most 12 roundings lie between an input and x', and 2 more between x' and y.
ROUNDINGS = 14
# d is a sum of squares (all positive, no cancellation): 3 roundings per term, then a tree or 16 lanes of partial sums.
D_ROUNDINGS = 48
# y is rounded once more, to the model's dtype: half an ulp, relative (float32: none beyond the above) and, below the smallest
# normal number, absolute. Triton's interpreter truncates when it stores bfloat16: a whole ulp there.
STORED = {
    torch.float32: (0.0, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}
INTERPRETED_BFLOAT16 = (2.0**-7, 2.0**-133)


@dataclass
class Case:
    """Arguments of one call, and which slots of history and which samples' noise must not be read."""

    uncond: Tensor
    cond: Tensor | None
    arguments: dict[str, Any]

    def clone(self) -> Case:
        copies = {name: None if t is None else clone(t) for name, t in self.arguments.items()}
        return Case(clone(self.uncond), None if self.cond is None else clone(self.cond), copies)

    def to(self, device: str) -> Case:
        moved = {name: None if t is None else t.to(device) for name, t in self.arguments.items()}
        return Case(self.uncond.to(device), None if self.cond is None else self.cond.to(device), moved)

    def run(self, **options: Any) -> None:
        guided_step(Operands(self.uncond, self.cond, **self.arguments), **options)


def clone(tensor: Tensor) -> Tensor:
    """A copy with the same strides (clone() makes some views contiguous)."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def make(
    seed: int,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    slots: int = 2,
    both: bool = True,
    noise: torch.dtype | None = None,
    combined: torch.dtype | None = None,
    anchored: bool = False,
    halves: int | None = 2,
    channels_last: bool = False,
    extra_channels: int = 0,
    inactive: float = 0.25,
    uniform: bool = False,
    timestep: torch.dtype | None = torch.float32,
) -> Case:
    """A batch in which every sample has its own schedule, position, policy and past (`uniform`: the same schedule and position).

    Whatever must not be read holds NaN: noise and history under a coefficient 0, unused rows and columns; whatever is to be
    written holds NaN too.
    """
    rng = np.random.default_rng(seed)
    batch, steps = shape[0], 6
    schedules = 1 if uniform else 3
    rows = _rows(rng, schedules, steps, slots, noise is not None)
    base = np.zeros(batch, int) if uniform else rng.integers(0, schedules, batch) * (steps + 1)
    step = np.full(batch, 2) if uniform else rng.integers(0, steps, batch)
    if not uniform and batch > 1:
        step[rng.random(batch) < inactive] = steps

    state = np.full((batch, len(State)), np.nan)
    observations = np.minimum(step, rng.integers(0, 4, batch))
    state[:, State.STEP], state[:, State.BASE] = step, base
    state[:, State.PHASE] = rng.choice([int(phase) for phase in Phase], batch)
    state[:, State.OBSERVATIONS] = observations
    elements = math.prod(shape[1:])
    state[:, State.LAST] = np.where(observations > 0, elements * rng.uniform(0.2, 3, batch), np.nan)
    state[:, State.BEFORE_LAST] = np.where(observations > 1, elements * rng.uniform(0.2, 6, batch), np.nan)
    state[:, State.MAXIMUM] = np.where(observations > 0, elements * 6.0, -np.inf)
    for column in (State.TRANSITION_STEP, State.MINIMUM_STEP, State.GATE_STEP, State.NON_FINITE):
        state[:, column] = -1
    state[:, State.LAST_ROW] = np.where(observations > 0, step - 1, -1)
    state[:, State.GATE_D], state[:, State.FORCED] = -np.inf, 0

    rules = np.zeros((batch, len(Rule)))
    rules[:, Rule.KIND] = rng.choice([int(kind) for kind in RuleKind], batch)
    rules[:, Rule.SWITCH_ROW] = rng.choice([1, 3, NEVER], batch)
    rules[:, Rule.GATE] = elements * rng.choice([0.5, 8.0], batch)
    rules[:, Rule.GATE_STEPS] = rng.integers(0, 4, batch)
    rules[:, Rule.MIN_STEP] = rng.choice([0, 0, 2], batch)
    rules[:, Rule.FLOOR] = rng.choice([1.0, 0.7], batch)
    rules[:, Rule.RHO] = 0.3
    rules[:, Rule.MAGNITUDE] = rng.choice([int(magnitude) for magnitude in Magnitude], batch)
    rules[:, Rule.COMBINED] = rng.choice([0.0, 1.0], batch)
    state[:, [State.LENGTH, State.PUSH, State.ANCHOR]] = 0
    if anchored:
        _anchor(rng, state, rules, elements)
    guidance = rng.choice([0.0, 1.0, -7.5, 7.5], (batch, steps, 2)).astype(np.float32)

    x = _tensor(rng, shape, torch.float32, channels_last)
    anchor = history_for(x, 2).fill_(math.nan) if anchored else None
    if anchor is not None:
        read = (rules[:, Rule.ANCHORED] != 0) & (state[:, State.PHASE] != Phase.PLAIN) & (state[:, State.ANCHOR] != 0)
        for b in np.flatnonzero(read):
            anchor[:, b] = torch.from_numpy(rng.standard_normal((2, *shape[1:])))
    own = None if combined is None else _tensor(rng, shape, combined, channels_last)
    if own is not None:
        own[torch.from_numpy(rules[:, Rule.COMBINED] == 0)] = math.nan
    both_halves = (2 * batch, shape[1] + extra_channels, *shape[2:])
    output = _tensor(rng, both_halves, dtype, channels_last)[:, : shape[1]]
    history = history_for(x, slots).fill_(math.nan)
    z = None if noise is None else torch.full_like(x, math.nan, dtype=noise)
    for b in range(batch):
        row = rows[int(base[b] + step[b])]
        if not row[Row.ACTIVE]:
            continue
        for slot in range(slots):
            if row[Row.H0 + slot]:
                history[slot, b] = torch.from_numpy(rng.standard_normal(shape[1:]))
        if z is not None and row[Row.N]:
            z[b] = torch.from_numpy(rng.standard_normal(shape[1:]))
    model_input = None
    if halves is not None:
        model_input = torch.cat([x] * halves).to(dtype).fill_(math.nan)
    fill = math.nan if timestep is not None and timestep.is_floating_point else -1
    times = None if timestep is None else torch.full((batch * (halves or 1),), fill, dtype=timestep)
    return Case(
        output[:batch],
        output[batch:] if both else None,
        {
            "combined": own,
            "x": x,
            "history": history,
            "model_input": model_input,
            "trace": torch.full((steps, batch), math.nan),
            "state": torch.from_numpy(state),
            "rows": torch.from_numpy(rows),
            "rules": torch.from_numpy(rules),
            "guidance": torch.from_numpy(guidance),
            "noise": z,
            "timestep_out": times,
            "anchor": anchor,
            "shares": torch.full((steps, batch), 77.0) if anchored else None,
        },
    )


def _anchor(rng: np.random.Generator, state: np.ndarray, rules: np.ndarray, elements: int) -> None:
    """Some samples are anchored, some of them from an earlier row on."""
    batch = len(state)
    rules[:, Rule.ANCHORED] = rng.choice([0.0, 1.0, 1.0], batch)
    rules[:, Rule.FAINT], rules[:, Rule.SHARP] = elements**0.5 * np.array([0.5, 2.0])[:, None]
    rules[:, Rule.BACK], rules[:, Rule.ETA] = rng.choice([0.0, 0.1], batch), rng.choice([0.0, 2.0], batch)
    rules[:, Rule.DRIFT], rules[:, Rule.MOST] = rng.choice([-0.5, 0.2], batch), 4.0
    state[:, State.LENGTH], state[:, State.PUSH] = elements**0.5 * rng.uniform(0, 3, batch), rng.uniform(0, 1, batch)
    state[:, State.ANCHOR] = rng.choice([0.0, 1.0, 1.0], batch)


def _rows(rng: np.random.Generator, schedules: int, steps: int, slots: int, noise: bool) -> np.ndarray:
    table = []
    for _ in range(schedules):
        rows = np.zeros((steps + 1, len(Row)))
        live = rows[:steps]
        live[:, Row.P : Row.N + 1] = rng.uniform(-1.5, 1.5, (steps, Row.N + 1 - Row.P))
        for column in range(Row.P, Row.N + 1):  # zeros and ones take paths of their own
            live[rng.random(steps) < 0.25, column] = 0.0
            live[rng.random(steps) < 0.15, column] = 1.0
        live[:, Row.H0 + slots : Row.H2 + 1] = 0.0
        if not noise:
            live[:, Row.N] = 0.0
        live[:, Row.S] = rng.choice([1.0, 0.6, 0.07], steps)
        live[:, Row.TIMESTEP] = rng.integers(0, 1000, steps)
        live[:, Row.OBSERVE] = rng.random(steps) < 0.8
        live[:, Row.STORE] = rng.integers(-1, slots, steps)
        live[:, Row.W_EPSILON : Row.W_X0 + 1] = rng.uniform(0.1, 3, (steps, 2))
        live[:, Row.ACTIVE] = 1
        live[:, Row.X], live[:, Row.E] = rng.uniform(0.1, 3, steps), rng.choice([-3.0, -0.4, 1.0, 0.7], steps)
        rows[steps, Row.S], rows[steps, Row.STORE] = 1.0, -1
        table.append(rows)
    return np.concatenate(table)


def _tensor(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    values = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    if channels_last:
        values = values.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    return values


def check(before: Case, after: Case, *, interpreted: bool = False) -> None:
    """Compare every tensor of `after` (a clone of `before` that was run) with the float64 reference."""
    old = {
        name: None if t is None else t.numpy().copy() if t.dtype != torch.bfloat16 else t.float().numpy()
        for name, t in before.arguments.items()
    }
    new = after.arguments
    uncond = before.uncond.float().numpy()
    cond = None if before.cond is None else before.cond.float().numpy()
    expected_trace = old["trace"].copy()
    expected_history = old["history"].copy()
    expected_shares = None if old["shares"] is None else old["shares"].copy()
    batch = uncond.shape[0]
    for b in range(batch):
        at = f"sample {b}"
        k = int(old["state"][b, State.STEP])
        d = None
        if cond is not None and old["rows"][int(old["state"][b, State.BASE]) + k, Row.ACTIVE]:
            d = float(new["trace"][k, b])
            exact = reference.squared_norm(uncond[b], cond[b])
            np.testing.assert_allclose(d, exact, rtol=D_ROUNDINGS * HALF_ULP, err_msg=f"d of {at}")
            expected_trace[k, b] = d
        want = reference.step(
            b, uncond, cond, d=d,
            **{name: old[name] for name in ("x", "history", "state", "rows", "rules", "guidance", "noise", "combined", "anchor")},
        )  # fmt: skip
        decided = State.LENGTH
        np.testing.assert_array_equal(new["state"][b, :decided].numpy(), want.state[:decided], err_msg=f"state of {at}")
        tail = new["state"][b, decided:].numpy()
        np.testing.assert_allclose(tail, want.state[decided:], rtol=1e-5, atol=1e-5, err_msg=f"anchor's state of {at}")
        outputs = [] if new["model_input"] is None else list(new["model_input"][b::batch])
        times = [] if new["timestep_out"] is None else new["timestep_out"][b::batch].tolist()
        if not want.active:
            np.testing.assert_array_equal(new["x"][b].numpy(), old["x"][b], err_msg=f"x of inactive {at}")
            for y in outputs:
                assert y.isnan().all(), f"model input of inactive {at} was written"
            assert all(time != time or time == -1 for time in times), f"timestep of inactive {at} was written"
            continue
        if new["shares"] is not None:
            np.testing.assert_allclose(new["shares"][k, b], want.share, rtol=1e-4, atol=1e-4, err_msg=f"share of {at}")
            expected_shares[k, b] = new["shares"][k, b]
            kept = old["anchor"][:, b] if want.anchor is None else np.stack(want.anchor)
            released = (
                want.state[State.PHASE] == Phase.PLAIN != old["state"][b, State.PHASE]
            )  # nobody reads it any more
            if not released:
                np.testing.assert_allclose(new["anchor"][:, b], kept, rtol=1e-5, atol=1e-5, err_msg=f"anchor of {at}")
        _close(new["x"][b], want.x, want.x_size, 0.0, 0.0, f"x of {at}")
        if want.store >= 0:
            _close(new["history"][want.store, b], want.m, want.m_size, 0.0, 0.0, f"m of {at}")
            expected_history[want.store, b] = new["history"][want.store, b].numpy()
        for y in outputs:
            relative, absolute = STORED[y.dtype]
            if interpreted and y.dtype == torch.bfloat16:
                relative, absolute = INTERPRETED_BFLOAT16
            _close(y, want.y, want.y_size, relative, absolute, f"model input of {at}")
        for time in times:
            rounded = torch.tensor(want.timestep).to(new["timestep_out"].dtype).item()
            assert time == rounded, f"timestep of {at}"
    np.testing.assert_array_equal(new["trace"].numpy(), expected_trace, err_msg="trace elsewhere")
    if expected_shares is not None:
        np.testing.assert_array_equal(new["shares"].numpy(), expected_shares, err_msg="shares elsewhere")
    np.testing.assert_array_equal(new["history"].numpy(), expected_history, err_msg="history elsewhere")
    for name in ("rows", "rules", "guidance", "noise", "combined"):
        if old[name] is not None:
            same = new[name].float().numpy() if new[name].dtype == torch.bfloat16 else new[name].numpy()
            np.testing.assert_array_equal(same, old[name], err_msg=f"{name} was changed")


def _close(got: Tensor, want: np.ndarray, size: np.ndarray, relative: float, absolute: float, what: str) -> None:
    value = got.double().numpy()
    allowed = ROUNDINGS * HALF_ULP * size + relative * np.abs(want) * (1 + 1e-3) + absolute
    error = np.abs(value - want)
    worst = np.unravel_index(
        np.argmax(np.where(error <= allowed, 0, np.nan_to_num(error, nan=np.inf) + 1e-300)), error.shape
    )
    assert (error <= allowed).all(), (
        f"{what}: at {worst} {value[worst]} instead of {want[worst]}, allowed {allowed[worst]}"
    )
