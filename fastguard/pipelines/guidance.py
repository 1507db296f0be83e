"""The guidance of one call: its policies lowered to a plan, and what the pipeline says of guidance while its loop runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastguard import checks
from fastguard.pipelines.attached import no_second_branch, policies_of
from fastguard.pipelines.families import Family
from fastguard.pipelines.outputs import needs_both
from fastguard.policies.plan import Plan, lower, unfit_guards
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy as make_policy
from fastguard.schedules.schedule import Schedule

UNGUIDED = ("raise", "run")  # what a guarded policy does in a call without guidance


class Guidance:
    """`pipe` is the stand-in on which the stock loop runs; a callback may change its guidance between two rows.

    plan    as of `begin`, or of the last change of the scale
    reason  what the report has to say of it
    """

    def __init__(self, policy: Policy, family: Family, arguments: Mapping[str, Any], pipe: Any, unguided: str) -> None:
        self.policy, self.family, self.arguments, self.pipe = policy, family, arguments, pipe
        self.plan: Any = None  # Plan
        self.reason: str | None = None
        self._unguided = unguided
        self._was_on = True  # the row before ran with guidance

    @property
    def on(self) -> bool:
        """Whether the pipeline runs both branches right now."""
        return self.family.guided(self.pipe, self.arguments)

    @property
    def rescale(self) -> float:
        return self.family.guidance_rescale(self.pipe, self.arguments)

    def own_step(self, rows: int) -> str | None:
        """Why the scheduler's own step() must run on the guided output in a call of so many rows, whatever the table can do."""
        reason = self.family.own_step(self.arguments, rows)
        if reason is None and self.rescale > 0.0:
            reason = f"guidance_rescale={self.rescale:g} needs the whole guided output before the update"
        return reason

    def begin(self, schedule: Schedule, latents: torch.Tensor, rows: int) -> Plan:
        """Make the plan of the call, of whose images `latents` has one each; its loop runs `rows` rows of the schedule."""
        if not self.on:
            self._refuse_unguided()
        self._samples = policies_of(self.policy, self.arguments, len(latents))
        self._schedule, self._elements = schedule, latents[0].numel()
        self.plan = self._lower()
        if any(branch != "both" for branch in self.plan.branches) and self.on:
            self.reason = needs_both(getattr(self.pipe, self.family.denoiser), self.arguments)
            self.plan = self._lower()
            self.reason = self.reason and f"both branches run in every row: {self.reason}"
        for sentence in unfit_guards(self.plan, rows):
            checks.warn(sentence)
        return self.plan

    def changed(self) -> bool:
        """Whether a callback has changed the guidance scale; the plan's rows still to come have the new one then."""
        if self.family.guidance_scale(self.pipe, self.arguments) == self._scale:
            return False
        self.plan = self._lower()
        return True

    @property
    def branches(self) -> tuple[str, ...]:
        """What each guided row runs. Rescaling needs the conditional output even where guidance does not."""
        return ("both",) * len(self.plan.branches) if self.rescale > 0.0 else self.plan.branches

    def check(self, row: int, schedule: Schedule) -> bool:
        """`on` at this row; warns if guidance ends before the guard does."""
        on = self.on
        if not on and row > 0 and self.policy.guarded and self._was_on:
            checks.warn(
                f"guidance was switched off at denoiser row {row} (by a callback): the guard ends with it, and an image that has "
                f"not reached its transition gets the conditional branch alone, which copies",
            )
        self._was_on = on
        if self.rescale > 0.0 and schedule.linear:
            raise RuntimeError("guidance_rescale was switched on during a guarded call, which had begun without it")
        return on

    def rescaled(self, guided: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """guidance_rescale of Lin et al. 2023 (arXiv 2305.08891, section 3.4): pull the standard deviation back to cond's."""
        phi = self.rescale
        if phi <= 0.0 or cond is None:
            return guided
        dims = tuple(range(1, guided.ndim))
        rescaled = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
        return phi * rescaled + (1 - phi) * guided

    def _refuse_unguided(self) -> None:
        if not (self.policy.guarded or self.policy.sets_scale):
            return
        scale = self.arguments.get("guidance_scale")
        if self._unguided == "run":
            self.policy = make_policy("cfg")
            self.reason = f"guidance_scale={scale!r}: no unconditional branch, so nothing was guarded (unguided='run')"
            return
        remedy = "pass a guidance_scale above 1 to a model with classifier-free guidance"
        raise no_second_branch(f"guidance_scale={scale!r}", remedy, self.policy)

    def _lower(self) -> Plan:
        self._scale = self.family.guidance_scale(self.pipe, self.arguments)
        plan = lower(self._samples, self._schedule, self._scale, self._elements)
        return plan if self.reason is None else replace(plan, branches=("both",) * len(plan.branches))
