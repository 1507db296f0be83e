"""Guidance over noise levels that become known one at a time: for callers that have no scheduler to compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastguard.kernels.layout import NEVER, Row, Rule
from fastguard.loop.guide import Guide
from fastguard.policies.plan import Plan, limit
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule, without_update

ROWS = 1024  # evaluations of one run at most


class Stepwise(Guide):
    """A `Guide` whose rows are written as they come: call `at` before every row.

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
