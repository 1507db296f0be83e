"""Policies as numbers: the rule table, the guidance of every row, the initial state, and which branches have to run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastguard import checks
from fastguard.files import short
from fastguard.kernels.layout import NEVER, Magnitude, Phase, Row, Rule, RuleKind, State
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule

# Anchored guidance (kernels/anchor.py), chosen on the tuning halves of two models (docs/anchored.md); strengths are RMS of m - mu.
FAINT, SHARP = 0.3, 0.6
BACK = 0.1
ETA = 4.0  # of a full schedule of 50 observations
DRIFT = 0.2
MOST = 4.0


@dataclass(frozen=True)
class Plan:
    """B policies over K denoiser rows. Tensors are on the CPU; B images, columns as in `fastguard.kernels.layout`.

    rules      float64 [B, len(Rule)]
    guidance   float32 [B, K, 2]: g before the transition, g otherwise; e = u + g (c - u)
    state      float64 [B, len(State)], the state before the first row
    branches   K times "both" | "uncond" | "cond": what must run so that no image lacks a branch that it may need
    policies   the B scalar policies, timesteps the K timesteps, elements those of one latent: for the report
    """

    rules: torch.Tensor
    guidance: torch.Tensor
    state: torch.Tensor
    branches: tuple[str, ...]
    policies: tuple[Policy, ...]
    timesteps: tuple[float, ...]
    elements: int
    late: bool = False
    """The run begins in the midst of its schedule (image-to-image)."""

    @property
    def anchored(self) -> bool:
        """Whether some image needs an anchor."""
        return bool(self.rules[:, Rule.ANCHORED].any())


def lower(policies: Sequence[Policy], schedule: Schedule, guidance_scale: float, elements: int) -> Plan:
    """Turn scalar policies (`Policy.samples`) into the tables that `guided_step` reads.

    schedule         of K denoiser rows
    guidance_scale   the pipeline's own, used where a policy has none
    elements         of one image's latent (channels x height x width)

    ValueError if a policy still holds per-image lists, a per-step guidance_scale is not as long as the rows, or a policy has a t_star
    or deadline where the schedule's timesteps count something else than training steps, or is anchored where the rows do not say what x0 is.
    """
    body = schedule.rows[:-1]
    times, observed = tuple(body[:, Row.TIMESTEP].tolist()), body[:, Row.OBSERVE].bool().tolist()
    scale = checks.number("guidance_scale", guidance_scale, "a finite number")
    elements = checks.integer("elements", elements, 1)

    rules = torch.zeros(len(policies), len(Rule), dtype=torch.float64)
    guidance = torch.zeros(len(policies), len(times), 2, dtype=torch.float32)
    needed: list[set[str]] = [set() for _ in times]
    for b, policy in enumerate(policies):
        if policy.images is not None:
            raise ValueError(f"policies[{b}] holds per-image lists: pass policy.samples(batch)")
        problem = None if schedule.in_steps else limit_problem(policy)
        if problem := problem or (anchor_problem(policy, schedule) if policy.anchored else None):
            raise ValueError(problem)
        switch_row = _switch_row(policy, times, observed)
        observations = sum(observed) * schedule.full / max(len(times), 1)  # of the full schedule
        rules[b] = torch.tensor(_rule(policy, switch_row, elements, observations), dtype=torch.float64)
        guidance[b] = torch.tensor(_guidance(policy, len(times), scale), dtype=torch.float32)
        for row, branch in zip(needed, _branches(policy, switch_row, guidance[b].tolist()), strict=True):
            row.add(branch)
    branches = tuple(row.pop() if len(row) == 1 else "both" for row in needed)
    late = schedule.full > len(times)
    return Plan(rules, guidance, _initial_state(policies), branches, tuple(policies), times, elements, late)


def limit(policy: Any) -> float | None:
    """The timestep at which a guard ends at the latest; None if it has none."""
    return policy.t_star if policy.transition == "static" else policy.deadline


def limit_problem(policy: Any) -> str | None:
    """Why a policy cannot be used where timesteps count no training steps; None if it can."""
    if limit(policy) is None:
        return None
    why = "counts training steps, which this scheduler's timesteps do not"
    use = "use a policy without such a limit ('paper-dtp'), or another scheduler"
    return f"policy {short(policy.name)}: {_limit(policy)} {why}; {use}"


def _limit(policy: Any) -> str:
    return f"t_star={policy.t_star:g}" if policy.transition == "static" else f"deadline={policy.deadline:g}"


def anchor_problem(policy: Policy, schedule: Schedule) -> str | None:
    """Why a policy cannot be anchored under this schedule; None if it can."""
    body = schedule.rows[:-1]
    unknown = body[:, [Row.X, Row.E]].isnan().any(1).nonzero().flatten().tolist()
    if not unknown:
        return None
    t = float(body[unknown[0], Row.TIMESTEP])
    why = schedule.no_x0 or f"at row {unknown[0]}, t = {t:g}, no x0 follows from the output (alpha is 0 there)"
    return f"policy {short(policy.name)} is anchored, which needs the x0-prediction of every row: {why}; use another scheduler"


def unfit_guards(plan: Plan, rows: int) -> list[str]:
    """One sentence for each policy whose limit lies outside of the timesteps of a call of `rows` rows.

    Image-to-image and refiners begin late, so that the guard is over at their first row; a base model that leaves the rest to a
    refiner (denoising_end) may end before the guard does.
    """
    found: dict[Policy, str] = {}
    first, last = plan.timesteps[0], plan.timesteps[max(rows, 1) - 1]
    for policy, switch_row in zip(plan.policies, plan.rules[:, Rule.SWITCH_ROW].tolist(), strict=True):
        if policy.anchored and plan.late:
            found[policy] = (
                "is anchored in a call that begins late (image-to-image): its anchor shows the given image, too, which was never measured"
            )
        if policy.transition and switch_row == 0:
            found[policy] = f"has no effect in this call: {_limit(policy)} is not below its first timestep, {first:g}"
        elif policy.transition and 0 < rows <= switch_row < len(plan.timesteps):
            found[policy] = (
                f"does not end in this call: {_limit(policy)} is not above its last timestep, {last:g} (denoising_end); an image "
                f"without an earlier transition never gets the guidance after it"
            )
    return [f"policy {policy.name!r} {what}" for policy, what in found.items()]


def of_images(policy: Policy, batch: int, per_prompt: int) -> list[Policy]:
    """Policies per image: lists may be as long as the batch of images or as the list of prompts."""
    prompts = batch // per_prompt
    each = per_prompt if policy.images == prompts else 1
    return [one for one in policy.samples(batch // each) for _ in range(each)]


def gate_threshold(tau: float, elements: int) -> float:
    """The smallest float32 d with sqrt(d / elements) >= tau, evaluated in float64: so that comparing d decides as comparing RMS does."""
    with np.errstate(over="ignore", under="ignore"):
        # The float32 nearest to the exact threshold, whose lower neighbour is thus below it: either this one or the next.
        nearest = np.float32(tau * tau * elements)
        either = float(nearest), float(np.nextafter(nearest, np.float32(np.inf)))
    return next(d for d in either if math.sqrt(d / elements) >= tau)


def _switch_row(policy: Any, times: Sequence[float], observed: Sequence[bool]) -> int:
    """First observing row at or below t_star (static) or the deadline (dynamic); row 0 where anchored guidance alone holds."""
    if policy.transition is None and policy.anchored:
        return 0  # no guidance before a transition: guarded at its own scale from the catch on
    last = limit(policy)
    return next((k for k, t in enumerate(times) if last is not None and observed[k] and t <= last), NEVER)


def _rule(policy: Any, switch_row: int, elements: int, observations: float) -> list[float]:
    row = [0.0] * len(Rule)
    row[Rule.KIND] = RuleKind[policy.rule.upper()] if policy.transition == "dynamic" else RuleKind.NONE
    row[Rule.SWITCH_ROW] = switch_row
    row[Rule.GATE] = math.inf if policy.gate is None else gate_threshold(policy.gate, elements)
    row[Rule.GATE_STEPS] = 0 if policy.gate is None else policy.gate_steps
    row[Rule.MIN_STEP] = policy.min_step
    row[Rule.FLOOR] = 1.0 - policy.min_drop
    row[Rule.RHO] = policy.rho
    row[Rule.MAGNITUDE] = Magnitude[policy.magnitude.upper()]
    row[Rule.COMBINED] = policy.guidance_scale is None
    if policy.anchored:
        side = math.sqrt(elements)  # norms for RMS
        row[Rule.ANCHORED :] = [1.0, FAINT * side, SHARP * side, BACK, ETA * 50 / observations, DRIFT, MOST]
    return row


def _guidance(policy: Any, rows: int, scale: float) -> list[tuple[float, float]]:
    """(g before the transition, g once it is over and of unguarded images throughout) of every row."""
    own = scale if policy.guidance_scale is None else policy.guidance_scale
    after = own if isinstance(own, tuple) else (own,) * rows
    if len(after) != rows:
        found = f"guidance_scale of policy {policy.name!r} has {len(after)} values"
        raise ValueError(f"{found}: must be one per denoiser row, {rows}")
    fixed = {"zero": 0.0, "conditional": 1.0}.get(policy.before, policy.before)
    before = [-s if fixed == "opposite" else fixed for s in after]
    if policy.opposite_steps is not None:
        before[policy.opposite_steps :] = [0.0] * (rows - policy.opposite_steps)
    return list(zip(before, after, strict=True))


def _branches(policy: Any, switch_row: int, guidance: Sequence[Sequence[float]]) -> list[str]:
    """Per row: "uncond" where g is surely 0, "cond" where it is surely 1, else "both". A dynamic rule, a gate and monitor need d."""
    if policy.monitor or policy.anchored or policy.transition == "dynamic" or policy.gate is not None:
        return ["both"] * len(guidance)
    before_until = switch_row if policy.transition == "static" else 0
    sure = [pair[0 if k < before_until else 1] for k, pair in enumerate(guidance)]
    return [{0.0: "uncond", 1.0: "cond"}.get(g, "both") for g in sure]


def _initial_state(policies: Sequence[Any]) -> torch.Tensor:
    state = torch.zeros(len(policies), len(State), dtype=torch.float64)
    for b, p in enumerate(policies):
        state[b, State.PHASE] = Phase.PLAIN if not p.guarded else Phase.BEFORE if p.gate is None else Phase.UNDECIDED
    state[:, [State.LAST, State.BEFORE_LAST, State.MARGIN]] = math.nan
    state[:, [State.MAXIMUM, State.GATE_D]] = -math.inf
    never = [State.LAST_ROW, State.TRANSITION_STEP, State.MINIMUM_STEP, State.GATE_STEP, State.NON_FINITE]
    state[:, never] = -1
    return state
