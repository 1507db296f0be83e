"""Measure what capturing gains and what it costs, on the call that it is meant for."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastguard.capture import cuda_graphs

MODES = ("off", "step", "loop")
REPEATS = 5
WORTH = 0.97  # a mode has to save 3% of the time of the one with less memory: below that it is the machine's own spread


@dataclass(frozen=True)
class Timing:
    """One mode. seconds: median of the repeats, spread their range; bytes: what the graphs hold; capture: seconds of recording."""

    mode: str
    path: str
    reason: str | None
    seconds: float
    spread: float
    bytes: int
    capture: float


@dataclass(frozen=True)
class Tuning:
    chosen: str
    timings: tuple[Timing, ...]

    def __str__(self) -> str:
        off = self.timings[0].seconds
        lines = [f"{'mode':<5} {'seconds':>9} {'spread':>8} {'gain':>7} {'graphs':>12} {'capture':>9}  path"]
        for t in self.timings:
            mark = "*" if t.mode == self.chosen else " "
            why = f" ({t.reason})" if t.reason else ""
            lines.append(
                f"{t.mode + mark:<5} {t.seconds:>9.4f} {t.spread:>8.4f} {1 - t.seconds / off:>7.1%} "
                f"{t.bytes / 2**20:>8.1f} MiB {t.capture:>7.2f} s  {t.path}{why}"
            )
        return "\n".join(lines)


def tune(guard: Any, pipe: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tuning:
    """Call `pipe` under every mode; the guard's own options are back afterwards.

    Only the mode measured last may leave its graphs, and only if it is chosen: those of "step" are recorded again in the next call.
    """
    before = guard.options
    timings: list[Timing] = []
    try:
        for mode in MODES:
            guard.graphs.clear()
            guard.use(dataclasses.replace(before, capture=mode))
            timings.append(_measure(guard, pipe, args, kwargs, mode))
    finally:
        guard.use(before)
    chosen = timings[0]
    # "loop" that became "step" is no mode of its own.
    graphed = {timing.path: timing for timing in reversed(timings) if "graph" in timing.path}
    for timing in sorted(graphed.values(), key=lambda t: t.bytes):
        if timing.seconds < WORTH * chosen.seconds:
            chosen = timing
    if chosen is not timings[-1]:
        guard.graphs.clear()  # those of the last mode, which nobody would use; the chosen mode's are recorded anew
    return Tuning(chosen.mode, tuple(timings))


def _measure(guard: Any, pipe: Any, args: tuple, kwargs: Mapping[str, Any], mode: str) -> Timing:
    device = pipe._execution_device
    pipe(*args, **kwargs)  # records
    seconds = []
    for _ in range(REPEATS):
        cuda_graphs.finish(device)
        start = time.perf_counter()
        pipe(*args, **kwargs)
        cuda_graphs.finish(device)
        seconds.append(time.perf_counter() - start)
    report = guard.report
    if report is None:
        raise RuntimeError("the call was not guarded (FASTGUARD_DISABLE?), so there is nothing to tune")
    return Timing(
        mode=mode,
        path=report.path,
        reason=report.reason,
        seconds=statistics.median(seconds),
        spread=max(seconds) - min(seconds),
        bytes=guard.graphs.bytes,
        capture=sum(info.seconds for info in guard.graphs()),
    )
