"""Curves over guidance scales and the least lead of one over another, once more."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.recheck.rows import DRAWS, Page, digits, share, shown


@functools.cache
def curves(page: Page, column: str) -> dict[str, tuple[list[float], np.ndarray, np.ndarray]]:
    """method -> scales, x and y [1 + DRAWS, S]; row 0 is everything, the others are draws of prompts, the same for all methods."""
    known: dict[tuple[str, float], dict[str, list[tuple[float, float]]]] = {}
    for r in page.rows:
        if r["group"] == "memorized" and r["seed"] < page.seeds and r["method"] != "first-look":
            if r.get(column) is None or r.get("faithful") is None:
                continue
            good = 0.0 if r.get("blown") else float(r["faithful"])
            known.setdefault((r["method"], r["scale"]), {}).setdefault(r["id"], []).append((float(r[column]), good))
    ids = sorted({i for cell in known.values() for i in cell})
    drawn = np.random.default_rng(0).integers(0, len(ids), (DRAWS, len(ids)))
    found = {}
    for method in dict.fromkeys(m for m, _ in known):
        scales = sorted(s for m, s in known if m == method and set(known[m, s]) == set(ids))
        if page.scale not in scales:
            continue
        x, y = [], []
        for s in scales:
            sums = np.array([np.sum(known[method, s][i], axis=0) for i in ids])
            n = np.array([len(known[method, s][i]) for i in ids])
            rows = [np.arange(len(ids)), *drawn]
            x.append([sums[d, 0].sum() / n[d].sum() for d in rows])
            y.append([sums[d, 1].sum() / n[d].sum() for d in rows])
        found[method] = (scales, np.array(x).T, np.array(y).T)
    return found


def floor_of(curves: Any) -> float:
    """The lowest faithfulness of any method."""
    return min(float(y[0].min()) for _, _, y in curves.values())


@dataclass(frozen=True)
class Lead:
    """Least of what ours offers at the other's x or less minus the other's y, over tenths of its segments with x < 0.5; interval, x.

    reach  share of those tenths at which ours has a point; near: least lead over them and its x
    """

    gap: float
    low: float
    high: float
    at: float
    reach: float
    near: tuple[float, float] | None


def lead(ours: Any, theirs: Any, floor: float) -> Lead | None:
    """None where the other has no x < 0.5."""
    x, y = (points(side) for side in theirs[1:])
    inside = [t for t in range(x.shape[1]) if x[0, t] < 0.5]
    if not inside:
        return None
    gaps = {t: offer(ours, 0, x[0, t], floor) - y[0, t] for t in inside}
    worst = min(inside, key=lambda t: gaps[t])
    every = [offer(ours, d, x[d, worst], floor) - y[d, worst] for d in range(1, DRAWS + 1)]
    low, high = np.percentile(every, [2.5, 97.5])
    near = [t for t in inside if ours[1][0].min() <= x[0, t] + 1e-4]
    there = min(near, key=lambda t: gaps[t], default=None)
    reached = None if there is None else (gaps[there], x[0, there])
    return Lead(gaps[worst], low, high, x[0, worst], len(near) / len(inside), reached)


def points(side: np.ndarray) -> np.ndarray:
    """Columns of the polyline: every point, and nine between two."""
    parts = [
        side[:, k : k + 1] + (side[:, k + 1 : k + 2] - side[:, k : k + 1]) * np.arange(10) / 10
        for k in range(side.shape[1] - 1)
    ]
    return np.concatenate([*parts, side[:, -1:]], 1)


def offer(curve: Any, d: int, x: float, floor: float) -> float:
    """The best y of the polyline at no more than x (1e-4 for rounding at its points)."""
    xs, ys = curve[1][d], curve[2][d]
    best = [b for a, b in zip(xs, ys, strict=True) if a <= x + 1e-4]
    for a0, a1, b0, b1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if a0 != a1 and min(a0, a1) <= x <= max(a0, a1):
            best.append(b0 + (b1 - b0) * (x - a0) / (a1 - a0))
    return max(best, default=floor)


def point(page: Page, curve: Any, line: list[str]) -> list[str]:
    scales, x, y = curve
    k = [f"{s:g}" for s in scales].index(line[2])
    cells = [shown((v[0, k], *np.percentile(v[1:, k], [2.5, 97.5]))) for v in (x, y)]
    blown = [r["blown"] for r in page.of(line[0], "memorized", scales[k]) if "blown" in r]
    return [line[0], digits(page.cost(line[0])), line[2], *cells, digits(np.mean(blown), ".0%") if blown else "-"]


def pair(page: Page, curves: Any, ours: str, other: str, floor: float) -> list[str]:
    start = [ours, other, digits(page.cost(other)), page.ratio(other)]
    found = lead(curves[ours], curves[other], floor)
    if found is None:
        return [*start, "-", "-", "-", "-", "the peer never gets there"]
    where = "on or above" if found.gap >= -1e-4 else "below, within the interval" if found.high >= 0 else "below"
    gap = shown((found.gap, found.low, found.high), "+.3f")
    near = "-" if found.near is None else f"{digits(found.near[0], '+.3f')} at {digits(found.near[1])}"
    return [*start, gap, digits(found.at), digits(found.reach, ".0%"), near, where]


def peers(page: Page, curves: Any) -> list[str]:
    """Taken from the settings: methods without a policy, but for plain guidance and what is no guard."""
    known = page.settings["methods"].items()
    return [m for m, v in known if "policy" not in v and m in curves and m not in ("none", "compile")]


def overview(page: Page, curves: Any, ours: str, floor: float, head: list[str]) -> list[str]:
    worst = []
    for dear, near in ((False, True), (False, False), (True, False)):
        some = {
            m: lead(curves[ours], curves[m], floor) for m in peers(page, curves) if (page.cost(m) > 1 + 1e-6) is dear
        }
        known = {m: f.near if near else (f.gap, f.at) for m, f in some.items() if f is not None}
        least = {m: one for m, one in known.items() if one is not None}
        name = min(least, key=lambda m: least[m][0], default="")
        worst.append(f"{digits(least[name][0], '+.3f')}, {name} at {digits(least[name][1])}" if name else "-")
    rows = page.of(ours, "ordinary")
    return [ours, digits(page.cost(ours)), page.ratio(ours), *worst, shown(share(rows, "faithful")) if rows else "-"]
