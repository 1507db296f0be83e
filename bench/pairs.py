"""Ratios that a noisy machine cannot fake: two things timed in turn, A B B A A B ..., and the ratio pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm


@dataclass(frozen=True)
class Ratios:
    """Seconds of A over seconds of B, one ratio a pair."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, _, high = statistics.quantiles(self.values, n=4)
        return f"{self.median:.3f} (quartiles {low:.3f} to {high:.3f}, {len(self.values)} pairs)"


def alternating(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    pairs: int = 20,
    repeat: int = 1,
    warmup: int = 1,
    progress: str | None = None,
) -> Ratios:
    """Time `a` against `b`, `repeat` calls a sample. Who goes first alternates, so a drift of the machine favours neither."""
    for _ in range(warmup):
        a()
        b()
    values = []
    for i in tqdm(range(pairs), desc=progress, disable=progress is None, leave=False):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        times = [_seconds(first, repeat), _seconds(second, repeat)]
        values.append(times[0] / times[1] if i % 2 == 0 else times[1] / times[0])
    return Ratios(tuple(values))


def _seconds(work: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        work()
    return time.perf_counter() - start
