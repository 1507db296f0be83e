"""Tables of rows by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastguard.kernels.layout import Row
from fastguard.schedules.schedule import Schedule


def schedule(timesteps: Sequence[float], observe: Iterable[bool] | None = None, in_steps: bool = True) -> Schedule:
    """Rows without an update (x' = e) at these timesteps; all of them observations unless said otherwise."""
    count = len(timesteps)
    rows = torch.zeros(count + 1, len(Row), dtype=torch.float64)
    rows[:, [Row.Q, Row.B, Row.S]] = 1
    rows[:, Row.STORE] = -1
    rows[:count, [Row.ACTIVE, Row.OBSERVE, Row.W_EPSILON, Row.W_X0]] = 1
    rows[:count, Row.TIMESTEP] = torch.tensor(timesteps, dtype=torch.float64)
    if observe is not None:
        rows[:count, Row.OBSERVE] = torch.tensor(list(observe), dtype=torch.float64)
    return Schedule(
        rows, torch.tensor(timesteps), 0, (0,) * count, float("nan"), "own step", False, "by hand", in_steps=in_steps
    )
