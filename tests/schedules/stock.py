"""Stock's own steps in float32, and an independent executor of the table that is compared with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastguard.kernels.layout import Row
from fastguard.schedules.schedule import Schedule

from .cases import Case


@dataclass
class Step:
    """What stock computed from what, in float32."""

    x: np.ndarray
    e: np.ndarray
    z: np.ndarray
    after: np.ndarray


def stock_run(case: Case, steps: int, schedule: Schedule, *, begin: int = 0) -> Iterator[Step]:
    """Stock's own float32 run on random denoiser outputs; our noise comes from a second generator of the same seed."""
    shape = (2, 4, 16, 16)
    outputs, ours, stock = (torch.Generator().manual_seed(seed) for seed in (1, 7, 7))
    scheduler = case.make(steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)  # as image-to-image pipelines do
    x = torch.randn(shape, generator=outputs) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {**case.step, "generator": stock} if accepts_generator else case.step
    for k, t in enumerate(scheduler.timesteps[begin:]):
        e = torch.randn(shape, generator=outputs)
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, t)
            np.testing.assert_allclose(scaled, float(schedule.rows[k, Row.S]) * x, rtol=1e-6)
        z = torch.zeros(shape)
        for _ in range(schedule.draws[k]):
            z = torch.randn(shape, generator=ours)
        after = scheduler.step(e, t, x, return_dict=False, **arguments)[0].clone()
        assert torch.equal(ours.get_state(), stock.get_state()), f"row {k}: other draws than stock's"
        yield Step(*(a.numpy() for a in (x, e, z, after)))
        x = after


class Table:
    """The table, executed in float32 by nothing but its definition."""

    def __init__(self, schedule: Schedule) -> None:
        self.rows = schedule.rows.numpy().astype(np.float32)
        self.history: list[np.ndarray | None] = [None] * schedule.history

    def step(self, k: int, x: np.ndarray, e: np.ndarray, z: np.ndarray) -> np.ndarray:
        row = self.rows[k]
        m = row[Row.P] * x + row[Row.Q] * e
        after = row[Row.A] * x + row[Row.B] * m
        for slot, kept in enumerate(self.history):
            if row[Row.H0 + slot] != 0.0:
                assert kept is not None, f"row {k} reads slot {slot} before anything was stored there"
                after = after + row[Row.H0 + slot] * kept
        assert not row[Row.H0 + len(self.history) : Row.H0 + 3].any()
        after = after + row[Row.N] * z
        if row[Row.STORE] >= 0:
            self.history[int(row[Row.STORE])] = m
        return after


def deviation(ours: np.ndarray, stock: np.ndarray) -> float:
    return float(np.abs(ours - stock).max() / np.abs(stock).max())
