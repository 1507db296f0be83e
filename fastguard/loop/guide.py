"""Guidance alone: policies and a row's two model outputs in, the guided output out, a report at the end. No pipeline, no scheduler step.

`Guide` runs over a schedule, `Stepwise` over noise levels that become known one at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastguard.kernels.layout import NEVER, Row, Rule
from fastguard.loop.loop import Loop, LoopShape
from fastguard.loop.report import Report
from fastguard.policies.plan import Plan, limit, lower
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule, without_update

ROWS = 1024  # evaluations of a `Stepwise` run at most


class Guide:
    """The guidance of B images over the K rows of a schedule, for callers that step the scheduler themselves.

    A `Loop` whose update is x' = e: the fused op decides (docs/architecture.md) and writes the guided output

        e = u + g (c - u)      of an image that the guard holds, or whose policy has a guidance scale of its own
        e = combined           of every other image, with the same bits, where the caller has a combination of its own

    plan      what guidance when; `plan.branches[row]` says which outputs the next row needs
    schedule  the rows, whose update is the caller's
    row       rows that ran; rows_run: denoiser rows per image that they took
    """

    def __init__(
        self, policies: Sequence[Policy], schedule: Schedule, *, guidance_scale: float, latents: torch.Tensor
    ) -> None:
        """policies: scalar, one per image; guidance_scale: of policies that have none; latents [B, C, *S]: for shape, device and layout.

        ValueError if there are not as many policies as latents, or `lower` refuses one.
        """
        if len(policies) != latents.shape[0]:
            raise ValueError(f"policies has {len(policies)} entries: must be one per image, {latents.shape[0]}")
        self.schedule = schedule
        self._policies, self._elements, self._scale = tuple(policies), latents[0].numel(), guidance_scale
        self.plan = self._lower()
        self.loop = self._loop_of(latents)
        self.row = self.rows_run = 0

    def _loop_of(self, latents: torch.Tensor) -> Loop:
        # What the op writes as the next model input is then e itself.
        schedule = self.schedule.with_own_step("guidance alone").unscaled()
        return Loop(schedule, self.plan, latents, LoopShape.of(schedule, self.plan, latents, halves=1))

    def __call__(
        self,
        uncond: torch.Tensor,
        cond: torch.Tensor | None,
        x: torch.Tensor | None = None,
        *,
        combined: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The guided output of the next row, [B, C, *S] in the dtype of `combined`, else of uncond. Nothing waits for the device.

        uncond, cond  the model's outputs [B, C, *S] of one dtype; of a row with one branch that branch and None
        x             the row's latents, for anchored policies
        combined      the caller's own guided output, [B, C, *S]

        RuntimeError after the last row.
        """
        if self.row == len(self.plan.timesteps):
            raise RuntimeError(f"all {self.row} rows of the schedule have run")
        loop = self.loop
        if x is not None:
            loop.x.copy_(x)
        loop.model_input = guided = torch.empty_like(loop.x, dtype=(uncond if combined is None else combined).dtype)
        loop.advance(uncond, cond, combined=combined)
        self.row += 1
        self.rows_run += 1 if cond is None else 2
        return guided

    def follow(self, guidance_scale: float) -> None:
        """Another scale from the next row on, for policies that have none; counters and decisions stay."""
        if guidance_scale != self._scale:
            self._scale = guidance_scale
            self.plan = self._lower()
            self.loop.load_plan(self.plan)

    def report(
        self, *, path: str = "guidance alone", reason: str | None = None, latents: torch.Tensor | None = None
    ) -> Report:
        """What happened in the rows so far. `latents` at the end, where the caller has them: whether they are finite."""
        return Report(self.loop, self.so_far(), rows_run=self.rows_run, path=path, reason=reason, latents=latents)

    def so_far(self) -> Plan:
        """The plan as the report shows it."""
        return self.plan

    def _lower(self) -> Plan:
        return lower(self._policies, self.schedule, self._scale, self._elements)


class Stepwise(Guide):
    """A `Guide` for callers that have no scheduler to compile: its rows are written as they come. Call `at` before every row.

    A row is an observation if its level is above all levels before it, so that further evaluations of a level count once, as in a
    schedule that was read from a scheduler. What that knows better: a mid-stage at a level of its own (KDPM2) is an observation here.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        *,
        guidance_scale: float,
        latents: torch.Tensor,
        in_steps: bool = True,
        observations: int | None = None,
    ) -> None:
        """Arguments as of `Guide`; in_steps: whether the timesteps that will be given count training steps; observations: how many
        noise levels a whole run has, where `at` will be told how x0 follows from the output: for anchored policies.

        ValueError for a guidance scale per row: how many rows there will be is not known.
        """
        for policy in policies:
            if isinstance(policy.guidance_scale, tuple):
                given = f"guidance_scale of policy {policy.name!r} has {len(policy.guidance_scale)} values"
                raise ValueError(f"{given}: must be one number, because the number of rows is not known here")
        super().__init__(policies, _blank(in_steps, observations), guidance_scale=guidance_scale, latents=latents)
        # What has no transition (anchored alone) has its guidance from the first row on.
        limits = [torch.inf if policy.transition is None else limit(policy) for policy in policies]
        known = [-torch.inf if t is None else t for t in limits]
        self._limits = torch.tensor(known, dtype=torch.float64).to(latents.device)
        self._highest = torch.full_like(self._limits[0], -torch.inf)

    def at(
        self,
        level: Any,
        timestep: Any,
        w_epsilon: Any = torch.nan,
        w_x0: Any = torch.nan,
        x0: tuple[Any, Any] | None = None,
    ) -> None:
        """The next row: its level (any number that grows while noise goes away), its timestep, the factors of d in epsilon and x0
        space, and (X, E) of x0(e) = X x + E e. Each is a number or a tensor of one element; a tensor on the latents' device is not
        waited for."""
        row = self.loop.rows[self.row]
        level = torch.as_tensor(level, dtype=row.dtype, device=row.device).reshape(())
        observed = level > self._highest
        self._highest = torch.maximum(self._highest, level)
        columns = {Row.OBSERVE: observed, Row.TIMESTEP: timestep, Row.W_EPSILON: w_epsilon, Row.W_X0: w_x0}
        for column, value in (columns if x0 is None else columns | {Row.X: x0[0], Row.E: x0[1]}).items():
            row[column] = value
        reached = observed & (row[Row.TIMESTEP] <= self._limits)
        self.loop.rules[:, Rule.SWITCH_ROW] = torch.where(reached, float(self.row), float(NEVER))

    def so_far(self) -> Plan:
        """Waits for the device."""
        times = self.loop.rows[: self.row, Row.TIMESTEP].tolist()
        return replace(self.plan, timesteps=tuple(times), branches=self.plan.branches[: self.row])


def _blank(in_steps: bool, observations: int | None) -> Schedule:
    """Rows that `at` writes; the first ones count as observations until then."""
    rows = without_update(torch.zeros(ROWS + 1, len(Row), dtype=torch.float64))
    rows[:-1, Row.ACTIVE] = 1.0
    rows[: observations or 0, Row.OBSERVE] = 1.0
    no_x0 = "no scheduler is known" if observations is None else None
    return Schedule(rows, rows[:-1, Row.TIMESTEP], in_steps=in_steps, no_x0=no_x0)
