"""A scheduler as a table: what one denoising run does, row by row. `compiler` makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastguard.kernels.layout import HISTORY, Row

SMALLEST_START = 0.01  # of the training's timesteps


@dataclass(frozen=True)
class Schedule:
    """What one denoising run does, per denoiser evaluation (row). Shared between callers: do not write into its tensors.

    rows         float64 [K + 1, len(Row)], CPU; the last row is inactive (ACTIVE = 0, S = 1, TIMESTEP = 0)
    timesteps    [K], the scheduler's own values and dtype, CPU
    history      history buffers in use, 0..3
    draws        noise draws per row as stock makes them, also where the coefficient is 0; all 0 if not linear: step() draws then
    residual     largest |x' - stock's x'| / max|x'| over all rows, everything in float64; NaN if not linear
    form         what m is, up to a factor: "epsilon" (the guided output e itself, whatever the model predicts), "x0", "converted"
                 (as the scheduler converts the output), "free" (read from the coefficients) or "own step"
    linear       False: P = 0, Q = 1, A = 0, B = 1, so that x' = e goes to the scheduler's own step(); S, TIMESTEP, OBSERVE and W_*
                 are valid all the same
    reason       why it is not linear
    noise_dtype  dtype in which stock draws; None: that of the model's output
    rounding     like residual, but with the table and its arithmetic in float32, against stock in float64
    looks_back   whether a row is true only where x is what the row before gave: stock goes back to an older sample there, and to
                 whatever somebody made of it in between
    no_x0        why X and E of the rows are unknown; None where they are known (NaN in a row where x0 does not exist)
    full         rows of the schedule that this run is the end of (image-to-image begins late)
    in_steps     whether timesteps count training steps; some schedulers' are logarithms or angles of the noise level
    """

    rows: torch.Tensor
    timesteps: torch.Tensor
    history: int = 0
    draws: tuple[int, ...] = ()
    residual: float = float("nan")
    form: str = "own step"
    linear: bool = False
    reason: str | None = None
    noise_dtype: torch.dtype | None = None
    rounding: float = float("nan")
    in_steps: bool = True
    looks_back: bool = False
    no_x0: str | None = None
    full: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", self.draws or (0,) * len(self.timesteps))
        object.__setattr__(self, "full", max(self.full, len(self.timesteps)))

    def with_own_step(self, reason: str) -> Schedule:
        """The same rows without an update: x' = e, for callers that must run the scheduler's own step() on the guided output."""
        if not self.linear:
            return self
        rows = without_update(self.rows)
        return Schedule(rows, self.timesteps, reason=reason, in_steps=self.in_steps, no_x0=self.no_x0, full=self.full)

    def unscaled(self) -> Schedule:
        """The same rows with S = 1: for loops that do not scale the model's input."""
        rows = self.rows.clone()
        rows[:, Row.S] = 1.0
        return replace(self, rows=rows)


def without_update(rows: torch.Tensor) -> torch.Tensor:
    """A copy with x' = e in every row."""
    rows = rows.clone()
    rows[:, [Row.P, Row.A, *range(Row.H0, Row.H0 + HISTORY), Row.N]] = 0.0
    rows[:, [Row.Q, Row.B]] = 1.0
    rows[:, Row.STORE] = -1.0
    return rows


def in_training_steps(scheduler: Any) -> bool:
    """By the whole schedule: one that counts steps begins among the hundreds, or has so few that they are small integers."""
    trained = getattr(scheduler, "config", {}).get("num_train_timesteps", 0)
    times = [float(t) for t in scheduler.timesteps]
    # From 1 to 0 (ACE-Step), or they grow as noise goes away (Mochi, LongCat audio).
    if trained == 1 or times[0] < times[-1]:
        return False
    return (trained > 0 and max(times) >= SMALLEST_START * trained) or all(t.is_integer() for t in times)
