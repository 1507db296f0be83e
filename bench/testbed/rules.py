"""Transition rules replayed on recorded curves, and what images they would have led to.

Until the transition a dynamic guard with `zero` runs the unconditional branch alone, whatever its rule.
So one curve d_k per prompt and seed, recorded under `zero` to the end, and one image for every transition
row on a grid are enough to rank the rules. Fixed timesteps and deadlines are named by the timestep at which they fire, all of them on
the grid, so that their images are the real ones; where a rule that looks at the curve fires between two rows of the grid, it is given
the image of the nearer, one row off. The presets of the main table and the best rule of each family are run for real.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastguard import Policy

EVERY = 3  # rows between the transitions of the grid
STATIC = range(861, 80, -60)  # t* of the fixed timesteps: rows 6, 9, 12 ... of 50
DEADLINES = (681, 561, 501, 381, 261, 201)
FAMILIES = {
    "static": lambda v: {"transition": "static", "t_star": v["t_star"]},
    "minimum": lambda v: {"transition": "dynamic", "rule": "minimum", **v},
    "drop in x0": lambda v: {"transition": "dynamic", "rule": "drop", "magnitude": "x0", **v},
    "drop in output": lambda v: {"transition": "dynamic", "rule": "drop", **v},
}


def as_policy(choice: dict, **fields) -> Policy:
    """A candidate ("family", "parameters") as a policy, with zero guidance before its transition if `fields` do not say otherwise."""
    return Policy(**{"before": "zero", **FAMILIES[choice["family"]](choice["parameters"]), **fields})


def signal(alphas_cumprod: np.ndarray, timesteps: Sequence[float]) -> np.ndarray:
    """(1 - alpha_bar) / alpha_bar per row: what turns d of an epsilon model into d in x0 space."""
    a = alphas_cumprod[np.asarray(timesteps, int)]
    return (1 - a) / a


def minimum(d: np.ndarray, min_step: int = 0, min_drop: float = 0.0) -> int | None:
    """The paper's rule: row k >= 2 with d[k-1] < d[k-2], d[k-1] < d[k]; None if it never fires."""
    for k in range(2, len(d)):
        low = d[k - 1]
        if k - 1 < min_step or not (low < d[k - 2] and low < d[k]):
            continue
        if low <= (1 - min_drop) * d[:k].max() or min_drop == 0:
            return k
    return None


def drop(d: np.ndarray, rho: float, min_step: int = 0) -> int | None:
    """First row at which d has fallen below rho times its own maximum so far."""
    for k in range(1, len(d)):
        if k >= min_step and d[k] < rho * d[: k + 1].max():
            return k
    return None


def with_deadline(row: int | None, timesteps: Sequence[float], deadline: float | None) -> int | None:
    """The earlier of the rule's row and the first row at or below the deadline."""
    if deadline is None:
        return row
    late = next((k for k, t in enumerate(timesteps) if t <= deadline), None)
    known = [k for k in (row, late) if k is not None]
    return min(known) if known else None


def candidates(timesteps: Sequence[float], noise: np.ndarray) -> list[dict]:
    """Rules with parameters: {"family", "parameters", "fire": curve -> row or None}.

    `noise` is `signal(...)`. Families: static, the paper's minimum (bare and with its additions), the
    drop rule in x0 space and in the model's own space. ValueError if a fixed timestep is not of the grid.
    """
    result: list[dict] = []
    on_grid = [float(t) for t in timesteps[::EVERY]]
    if missing := [t for t in (*STATIC, *DEADLINES) if t not in on_grid]:
        raise ValueError(f"timesteps {missing}: must be of the grid, {on_grid}")

    def add(family: str, fire, **parameters) -> None:
        result.append({"family": family, "parameters": parameters, "fire": fire})

    for t_star in STATIC:
        row = with_deadline(None, timesteps, t_star)
        add("static", lambda d, row=row: row, t_star=t_star)
    for deadline in (None, *DEADLINES):
        for min_drop in (0.0, 0.1, 0.2, 0.3, 0.5):
            add(
                "minimum",
                lambda d, a=min_drop, b=deadline: with_deadline(minimum(d, 0, a), timesteps, b),
                min_drop=min_drop,
                deadline=deadline,
            )
    for rho in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05):
        add("drop in x0", lambda d, r=rho: drop(d * noise, r), rho=rho)
        add("drop in output", lambda d, r=rho: drop(d, r), rho=rho)
    return result


def outcome(rule: dict, curves: list[dict], grid: dict) -> list[dict]:
    """One measured row per curve: the image of the grid's transition nearest to the rule's.

    grid[(prompt, seed)] is a list of rows of `run`, one per transition EVERY rows; its last entry is the
    image without any transition (the unconditional one).
    """
    rows = []
    for curve in curves:
        d = np.array(curve["d_curve"], float)
        fired = rule["fire"](d)
        images = grid[curve["prompt"], curve["seed"]]
        place = len(images) - 1 if fired is None else min(round(fired / EVERY), len(images) - 2)
        rows.append({**images[place], "fired": fired})
    return rows
