"""The images of every transition row on a grid, and the curves under zero guidance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import Prompt, rules
from .measures import Judge
from .run import CALL, Job, jobs, run


def timesteps(pipe: Any) -> list[float]:
    """The timesteps of the default call."""
    pipe.scheduler.set_timesteps(CALL["num_inference_steps"])
    return [float(t) for t in pipe.scheduler.timesteps]


def noise(pipe: Any) -> np.ndarray:
    """(1 - alpha_bar) / alpha_bar at those timesteps."""
    return rules.signal(pipe.scheduler.alphas_cumprod.numpy(), timesteps(pipe))


def curves(pipe: Any, judge: Judge, name: str, prompts: Sequence[Prompt], seeds: int, cache: Path) -> list[dict]:
    """Unconditional images whose reports hold the whole curve of d."""
    from fastguard import policy

    never = policy("stp", t_star=0, monitor=True)
    return run(pipe, judge, f"{name}-never", jobs(prompts, seeds, never), cache)


def transitions(
    pipe: Any, judge: Judge, name: str, prompts: Sequence[Prompt], seeds: int, cache: Path
) -> tuple[list[dict], dict]:
    """Curves, and per (prompt, seed) the rows of transitions 0, EVERY, 2 EVERY ..., never."""
    from fastguard import policy

    never = curves(pipe, judge, name, prompts, seeds, cache)
    starts = timesteps(pipe)[:: rules.EVERY]
    work = [Job(p, s, policy("stp", t_star=t)) for t in starts for p in prompts for s in range(seeds)]
    rows = run(pipe, judge, f"{name}-grid", work, cache)
    table: dict = {}
    for row in [*rows, *never]:
        table.setdefault((row["prompt"], row["seed"]), []).append(row)
    return never, table


def front(pipe: Any, never: list[dict], table: dict) -> list[dict]:
    """Every candidate rule with copy rate, faithfulness of what is no copy, and usefulness.

    useful = share of images that are no copy AND show their caption: one number that neither garbage nor
    copies can raise.
    """
    result = []
    for rule in rules.candidates(timesteps(pipe), noise(pipe)):
        rows = rules.outcome(rule, never, table)
        free = [r for r in rows if not r["copy"]]
        fired = [r["fired"] for r in rows if r["fired"] is not None]
        result.append(
            {
                "family": rule["family"],
                "parameters": rule["parameters"],
                "copies": float(np.mean([r["copy"] for r in rows])),
                "faithful": float(np.mean([r["faithful"] for r in free])) if free else None,
                "useful": float(np.mean([not r["copy"] and r["faithful"] for r in rows])),
                "blown": float(np.mean([r["blown"] for r in rows])),
                "fired": len(fired) / len(rows),
                "median row": float(np.median(fired)) if fired else None,
            }
        )
    return result
