"""The images of every transition row on a grid, and the curves under zero guidance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastguard.testbed import Prompt
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import CALL, Sample

from . import rules
from .run import jobs, run
from .stats import over_prompts


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
    work = [Sample(p, s, policy("stp", t_star=t)) for t in starts for p in prompts for s in range(seeds)]
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
        result.append(
            {
                "family": rule["family"],
                "parameters": rule["parameters"],
                "copies": float(np.mean([r["copy"] for r in rows])),
                "faithful": float(np.mean([r["faithful"] for r in free])) if free else None,
                "useful": float(np.mean([not r["copy"] and r["faithful"] for r in rows])),
                "blown": float(np.mean([r["blown"] for r in rows])),
                "fired": float(np.mean([r["fired"] is not None for r in rows])),
                "median row": _median([r["fired"] for r in rows]),
            }
        )
    return result


def contest(pipe: Any, judge: Judge, prompts: Sequence[Prompt], seeds: int, cache: Path, ranked: list[dict]) -> dict:
    """The most useful candidate of each family, run for real, and how far they lie apart, seed by seed; intervals over prompts.

    `ranked` is what `front` gave. All of it is of the half on which the candidates were compared, so it favours every one of them.
    """
    best = {}
    for family in dict.fromkeys(entry["family"] for entry in ranked):
        chosen = max((e for e in ranked if e["family"] == family), key=lambda e: e["useful"])
        label = "-".join([family, *(f"{k}_{v:g}" for k, v in chosen["parameters"].items() if v is not None)])
        work = jobs(prompts, seeds, rules.as_policy(chosen))
        rows = run(pipe, judge, f"contest-{label.replace(' ', '_')}", work, cache)
        best[family] = [r | {"useful": bool(not r["copy"] and r["faithful"])} for r in rows], chosen
    pairs = itertools.combinations(best, 2)
    return {
        "best": {
            family: {
                "parameters": entry["parameters"],
                "useful": over_prompts(rows, "useful"),
                "useful, replayed": entry["useful"],
                "copies": over_prompts(rows, "copy"),
                "faithful, no copies": over_prompts([r for r in rows if not r["copy"]], "faithful"),
                "fired": float(np.mean([r["transition_step"] is not None for r in rows])),
                "median row": _median([r["transition_step"] for r in rows]),
            }
            for family, (rows, entry) in best.items()
        },
        "differences": [{"more": a, "less": b, "useful": _difference(best[a][0], best[b][0])} for a, b in pairs],
    }


def _difference(more: Sequence[dict], less: Sequence[dict]) -> dict | None:
    apart = [a | {"apart": float(a["useful"]) - float(b["useful"])} for a, b in zip(more, less, strict=True)]
    return over_prompts(apart, "apart", share=False)


def _median(rows: Sequence[int | None]) -> float | None:
    fired = [row for row in rows if row is not None]
    return float(np.median(fired)) if fired else None
