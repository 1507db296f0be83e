"""How the GPU benchmarks time things, and what they refuse to time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

# Of the largest value: stock rounds its latents to float16 (2^-11) after each of up to 20 steps, ours are float32.
CLOSE = 0.02

Result = dict[str, Any]
Results = Generator[Result, None, None]
Work = Callable[[], Any]


class WrongValues(Exception):
    """Nothing is timed that computes something else."""


def close(difference: float) -> float:
    """A difference relative to the largest value, handed back; beyond what float16 explains: WrongValues."""
    if not difference <= CLOSE:
        raise WrongValues(f"latents differ from stock's by {difference:.2g} of the largest value, allowed: {CLOSE:g}")
    return difference


def rounds(works: Mapping[str, Work], *, least: int = 3, most: int = 20, seconds: float = 3.0) -> dict[str, Result]:
    """Time works by turns, so that a drift of the machine favours none: `least` rounds, then as many as `seconds` allow.

    Each gets median and quartiles of the time between two events around it, and of its ratio to the first work of the same round.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    end_at = time.monotonic() + seconds
    done = 0
    while done < least or (done < most and time.monotonic() < end_at):
        for name, work in works.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
        done += 1
    first = next(iter(times.values()))
    return {
        name: {
            "ms": _spread(values),
            "ratio": _spread([a / b for a, b in zip(values, first, strict=True)]),
            "rounds": done,
        }
        for name, values in times.items()
    }


def _spread(values: list[float]) -> Result:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}
