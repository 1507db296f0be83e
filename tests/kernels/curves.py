"""What the guard has to decide on a finished curve, and the fused op driven over one.

`reference` is written from the published rules alone and looks at a curve as a whole, where the op streams through it. The
curve is injected exactly: latents of one element, u = 0 and c = r with few enough bits that d = r^2 is a float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from fastguard.kernels.arguments import Operands
from fastguard.kernels.guided_step import guided_step
from fastguard.kernels.layout import Row
from fastguard.loop.report import Report
from fastguard.policies.plan import Plan, lower
from fastguard.policies.policy import Policy
from tests import tables

NAN, INF = math.nan, math.inf
SCALE = 3.0


@dataclass
class Schedule:
    """What a decision may depend on besides d: timesteps, which rows are observations, and the factors of the magnitudes."""

    times: list[float]
    observe: list[bool]
    w_epsilon: list[float]
    w_x0: list[float]


# The reference -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    guidance: list[float]
    transition: int | None = None
    minimum: int | None = None
    margin: float | None = None
    forced: bool = False
    caught: int | None = None
    gate_rms: float | None = None
    non_finite: int | None = None


def reference(p: Policy, d: list[float | None], s: Schedule, elements: int) -> Outcome:
    """What the guard has to do with a sample whose curve is d (None where one branch was not run)."""
    rows = range(len(d))
    scale = p.guidance_scale if p.guidance_scale is not None else SCALE
    after = list(scale) if isinstance(scale, tuple) else [scale] * len(d)
    out = Outcome(guidance=list(after))
    out.non_finite = next((k for k in rows if d[k] is not None and not math.isfinite(d[k])), None)
    if p.transition is None:
        return out

    seen = [k for k in rows if s.observe[k] and d[k] is not None]
    start = 0
    if p.gate is not None:
        rms = [(k, math.sqrt(d[k] / elements)) for k in seen[: p.gate_steps] if not math.isnan(d[k])]
        out.caught = next((k for k, value in rms if value >= p.gate), None)
        looked = [value for k, value in rms if out.caught is None or k <= out.caught]
        out.gate_rms = max(looked, default=None)
        if out.caught is None:
            return out
        start = out.caught

    limit = p.t_star if p.transition == "static" else p.deadline
    reached = [k for k in rows if limit is not None and s.observe[k] and s.times[k] <= limit]
    switch = max(reached[0], start) if reached else None

    fires = _fires(p, [(k, _statistic(p, k, d[k], s)) for k in seen]) if p.transition == "dynamic" else []
    fires = [(k, minimum, margin) for k, minimum, margin in fires if k >= start]
    if fires and (switch is None or fires[0][0] <= switch):
        out.transition, out.minimum, out.margin = fires[0]
    elif switch is not None:
        out.transition, out.forced = switch, p.transition == "dynamic"

    end = len(d) if out.transition is None else out.transition
    for k in range(start, end):
        value = {"zero": 0.0, "conditional": 1.0, "opposite": -after[k]}.get(p.before, p.before)
        out.guidance[k] = 0.0 if p.opposite_steps is not None and k >= p.opposite_steps else value
    return out


def _statistic(p: Policy, k: int, d: float, s: Schedule) -> float:
    return d * {"output": 1.0, "epsilon": s.w_epsilon[k], "x0": s.w_x0[k]}[p.magnitude]


def _fires(p: Policy, curve: list[tuple[int, float]]) -> list[tuple[int, int | None, float]]:
    """Every observation at which the rule would fire: (row, row of the minimum, margin)."""
    found: list[tuple[int, int | None, float]] = []
    values = [value for _, value in curve]
    for i, (k, value) in enumerate(curve):
        if p.rule == "drop":
            peak = max((v for v in values[: i + 1] if not math.isnan(v)), default=NAN)
            if i >= p.min_step and value < p.rho * peak:
                found.append((k, None, 1 - value / (p.rho * peak)))
        elif i >= 2 and values[i - 2] > values[i - 1] < value and i - 1 >= p.min_step:
            peak = max(v for v in values[:i] if not math.isnan(v))
            if values[i - 1] < (1 - p.min_drop) * peak:
                found.append((k, curve[i - 1][0], 1 - values[i - 1] / min(values[i - 2], value)))
    return found


# The op --------------------------------------------------------------------------------------------------------------------


def run(
    policies: list[Policy],
    roots: list[list[float]],
    s: Schedule,
    elements: int,
    device: str = "cpu",
) -> tuple[Plan, Report, torch.Tensor]:
    """Drive the op over curves d = roots^2; returns the plan, the report and the guided output of every row [K, B]."""
    batch, steps = len(policies), len(s.times)
    table = tables.schedule(s.times, s.observe)
    plan, rows = lower(policies, table, SCALE, elements), table.rows
    rows[:steps, Row.W_EPSILON], rows[:steps, Row.W_X0] = (torch.tensor(w).double() for w in (s.w_epsilon, s.w_x0))
    buffers = {
        "x": torch.zeros(batch, 1, 1, 1, device=device),
        "history": torch.zeros(0, batch, 1, 1, 1, device=device),
        "model_input": None,
        "trace": torch.full((steps, batch), NAN, device=device),
        "state": plan.state.to(device),
        "rows": rows.to(device),
        "rules": plan.rules.to(device),
        "guidance": plan.guidance.to(device),
    }
    u = torch.zeros(batch, 1, 1, 1, device=device)
    curves = torch.tensor(roots, dtype=torch.float32, device=device).T.reshape(steps, batch, 1, 1, 1)
    guided = []
    for k, branch in enumerate(plan.branches):
        outputs = {"both": (u, curves[k]), "uncond": (u, None), "cond": (curves[k], None)}[branch]
        guided_step(Operands(*outputs, **buffers))
        guided.append(buffers["x"].flatten().clone())
    finished = buffers["state"].clone()
    guided_step(Operands(u, u, **buffers))  # one step too many: an inactive row touches nothing
    assert torch.equal(finished.nan_to_num(-7.0), buffers["state"].nan_to_num(-7.0))
    return (
        plan,
        Report(SimpleNamespace(**buffers, shares=None), plan, path="test", rows_run=0),
        torch.stack(guided).cpu(),
    )


def check(
    policies: list[Policy],
    roots: list[list[float]],
    s: Schedule,
    elements: int = 1,
    device: str = "cpu",
) -> list[str]:
    """Compare the op with the reference; returns what kind of decision each sample met."""
    kinds = []
    plan, report, guided = run(policies, roots, s, elements, device)
    for b, (p, image) in enumerate(zip(policies, report, strict=True)):
        r = torch.tensor(roots[b], dtype=torch.float32)
        d = [float(value) if branch == "both" else None for value, branch in zip(r * r, plan.branches, strict=True)]
        want = reference(p, d, s, elements)
        where = f"sample {b}: {p}, d = {d}"
        assert image.transition_step == want.transition, where
        assert image.minimum_step == want.minimum, where
        assert image.forced == want.forced, where
        assert _close(image.margin, want.margin), where
        assert image.non_finite == want.non_finite, where
        if p.gate is not None:
            assert image.gate["step"] == want.caught, where
            assert _close(image.gate["rms"], want.gate_rms), where
        g = torch.tensor(want.guidance, dtype=torch.float32)
        e = g * r
        for k, branch in enumerate(plan.branches):
            if branch != "both":  # sound only if every sample's guidance is that branch alone
                assert g[k] == {"uncond": 0.0, "cond": 1.0}[branch], where
                e[k] = {"uncond": 0.0, "cond": r[k]}[branch]
        torch.testing.assert_close(guided[:, b], e, rtol=0, atol=0, equal_nan=True, msg=where)
        kinds.append(_kind(p, want))
    return kinds


def _close(found: float | None, wanted: float | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return found == wanted or math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12)


def _kind(p: Policy, want: Outcome) -> str:
    if p.gate is not None and want.caught is None:
        return "released by the gate"
    how = "never" if want.transition is None else "forced" if want.forced else "fired"
    return f"{p.transition} {p.rule}: {how}" + ("" if p.gate is None else ", caught")
