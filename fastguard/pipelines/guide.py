"""Guidance of B images over one schedule: (u, c) of a row in, guided output out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastguard.kernels.layout import Phase, Row, State
from fastguard.loop.loop import Loop
from fastguard.loop.report import Report
from fastguard.policies.plan import Plan, lower
from fastguard.policies.policy import Policy
from fastguard.schedules.compiler import Schedule


class Guide:
    def __init__(
        self, policies: Sequence[Policy], schedule: Schedule, *, guidance_scale: float, latents: torch.Tensor
    ) -> None:
        self._policies, self._schedule, self._elements = policies, schedule, latents[0].numel()
        self._scale = guidance_scale
        self.plan = self._lower()
        self._loop = Loop(schedule.with_own_step("own combination"), self.plan, latents, halves=1)
        own = [policy.guidance_scale is not None for policy in policies]
        self._own = torch.tensor(own).to(latents.device, non_blocking=True) if any(own) else None
        self._plain = not any(own) and not any(policy.transition for policy in policies)

    def __call__(self, uncond, cond, x=None, *, combined=None):
        self._loop.advance(uncond, cond, None)
        if combined is None:
            return self._loop.x.to(uncond.dtype)
        if self._plain:
            return combined
        chosen = self._loop.state[:, State.PHASE] == Phase.BEFORE
        if self._own is not None:
            chosen |= self._own
        return torch.where(chosen.view(-1, *[1] * (combined.ndim - 1)), self._loop.x.to(combined.dtype), combined)

    def follow(self, guidance_scale: float) -> None:
        if guidance_scale != self._scale:
            self._scale = guidance_scale
            self.plan = self._lower()
            self._loop.load_plan(self.plan)

    def report(self, **facts: Any) -> Report:
        return Report.read(self._loop.state, self._loop.trace, self.plan, **facts)

    def _lower(self) -> Plan:
        rows = self._schedule.rows[:-1]
        return lower(
            self._policies,
            timesteps=rows[:, Row.TIMESTEP],
            observe=rows[:, Row.OBSERVE],
            guidance_scale=self._scale,
            elements=self._elements,
            in_steps=self._schedule.in_steps,
        )
