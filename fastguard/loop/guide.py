"""Guidance alone: policies and a row's two model outputs in, the guided output out, a report at the end. No pipeline, no scheduler step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastguard.loop.loop import Loop, LoopShape
from fastguard.loop.report import Report
from fastguard.policies.plan import Plan, lower
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule


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
