"""Similarity against faithfulness over guidance scales, and who lies above whom, where images are no copies.

A method's curve is the polyline through its points (x, y) = (mean similarity, mean faithfulness of ALL its images), one a guidance
scale, in the order of the scales. What a method offers at similarity x is

    E(x) = max { y : (x', y) on its polyline, x' <= x }:

an image that is less similar to the training image is no worse. Where the polyline has no point at or below x, E(x) is the floor, the
lowest faithfulness that any method had: a curve that never gets there is not excused. A curve lies on or above another if
E(x) >= y at every point (x, y) of the other's polyline (each segment in tenths); what differs by at most 1e-4 counts as equal, in x
and in y, or the same arithmetic in another order would not be "on" its own curve. Only the part of the other's polyline below a
similarity of BELOW counts: right of it images are copies, and copies mostly are faithful. Intervals are pointwise, 95%, from a bootstrap over
prompts in which all methods see the same draw, since seeds and prompts are paired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.testbed.stats import DRAWS

TENTHS = 10
BELOW = 0.5
SAME = 1e-4  # of similarities and of faithfulness; three digits are shown


@dataclass(frozen=True)
class Curve:
    """A method's points, in the order of its guidance scales.

    scales  [S]
    x, y    [1 + DRAWS, S]: row 0 all prompts, the others bootstrap draws
    """

    scales: tuple[float, ...]
    x: np.ndarray
    y: np.ndarray

    def points(self) -> list[dict[str, Any]]:
        """Per scale the means with their intervals."""
        found = []
        for k, scale in enumerate(self.scales):
            (xl, xh), (yl, yh) = (np.percentile(v[1:, k], [2.5, 97.5]) for v in (self.x, self.y))
            found.append(
                {
                    "scale": scale,
                    "x": {"mean": float(self.x[0, k]), "low": float(xl), "high": float(xh)},
                    "y": {"mean": float(self.y[0, k]), "low": float(yl), "high": float(yh)},
                }
            )
        return found

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Points of the polyline, each segment in tenths: x and y [1 + DRAWS, T]."""
        if len(self.scales) == 1:
            return self.x, self.y
        at = np.arange(0, len(self.scales) - 1 + 0.5 / TENTHS, 1 / TENTHS)
        low = np.minimum(at.astype(int), len(self.scales) - 2)
        w = at - low
        return tuple(v[:, low] * (1 - w) + v[:, low + 1] * w for v in (self.x, self.y))  # type: ignore[return-value]

    def offers(self, x: np.ndarray, floor: float) -> np.ndarray:
        """E(x) per draw: [1 + DRAWS] -> [1 + DRAWS]."""
        at = x[:, None]
        best = np.where(self.x <= at + SAME, self.y, -np.inf).max(1)
        if len(self.scales) > 1:
            x0, x1, y0, y1 = self.x[:, :-1], self.x[:, 1:], self.y[:, :-1], self.y[:, 1:]
            crosses = (np.minimum(x0, x1) <= at) & (at <= np.maximum(x0, x1)) & (x0 != x1)
            w = (at - x0) / np.where(x0 == x1, 1, x1 - x0)
            best = np.maximum(best, np.where(crosses, y0 * (1 - w) + y1 * w, -np.inf).max(1))
        return np.where(np.isfinite(best), best, floor)


def curves(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, Curve]:
    """The curves of all methods from rows of memorized prompts; scales at which a value is missing are left out."""
    cells: dict[tuple[str, float], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            cells[row["method"], row["scale"]][row["id"]].append((float(row[x]), float(row[y])))
    if not cells:
        return {}
    ids = sorted({name for cell in cells.values() for name in cell})
    pick = np.random.default_rng(0).integers(0, len(ids), (DRAWS, len(ids)))
    times = np.stack([np.bincount(p, minlength=len(ids)) for p in pick])
    weights = np.concatenate([np.ones((1, len(ids))), times])
    found = {}
    for method in dict.fromkeys(name for name, _ in cells):
        scales = sorted(s for name, s in cells if name == method and len(cells[name, s]) == len(ids))
        if not scales:
            continue
        sums = np.array([[np.sum(cells[method, s][i], axis=0) for i in ids] for s in scales])  # [S, P, 2]
        counts = np.array([[len(cells[method, s][i]) for i in ids] for s in scales])  # [S, P]
        means = np.einsum("dp,spc->dsc", weights, sums) / (weights @ counts.T)[..., None]
        found[method] = Curve(tuple(scales), means[..., 0], means[..., 1])
    return found


def compare(ours: Curve, theirs: Curve, floor: float, below: float = BELOW) -> dict[str, Any] | None:
    """The least E_ours(x) - y over the other's polyline at x < below, where it is, its interval; None where it has no such point.

    reached       share of those points of the other at whose similarity `ours` has a point at all
    within reach  the least lead over these alone, and where; None where there are none
    """
    x, y = theirs.samples()
    inside = np.flatnonzero(x[0] < below)
    if not len(inside):
        return None
    gaps = {t: ours.offers(x[:, t], floor) - y[:, t] for t in inside}
    worst = min(inside, key=lambda t: gaps[t][0])
    near = [t for t in inside if ours.x[0].min() <= x[0, t] + SAME]
    nearest = min(near, key=lambda t: gaps[t][0], default=None)
    low, high = np.percentile(gaps[worst][1:], [2.5, 97.5])
    return {
        "gap": float(gaps[worst][0]),
        "low": float(low),
        "high": float(high),
        "at": float(x[0, worst]),
        "reached": len(near) / len(inside),
        "within reach": None if nearest is None else {"gap": float(gaps[nearest][0]), "at": float(x[0, nearest])},
        "on or above": bool(gaps[worst][0] >= -SAME),
        "within the interval": bool(high >= 0),
    }


def verdict(
    found: Mapping[str, Curve], cost: Mapping[str, float], ours: Sequence[str], others: Sequence[str]
) -> list[dict[str, Any]]:
    """Every one of `ours` against every one of `others`: `compare`'s numbers with both names and costs; "gap" None where there is nothing to compare."""
    floor = float(min((curve.y[0].min() for curve in found.values()), default=0.0))
    pairs = []
    for one in ours:
        for other in others:
            if one in found and other in found and one != other:
                result = compare(found[one], found[other], floor) or {"gap": None}
                pairs.append({"ours": one, "other": other, "cost": cost[one], "other cost": cost[other], **result})
    return pairs


def affordable(pair: Mapping[str, Any]) -> bool:
    """Whether the other costs no more than plain guidance."""
    return pair["other cost"] <= 1 + 1e-6


def _gap(pair: Mapping[str, Any], axis: str) -> str:
    gap, low, high = (round(pair[key], 3) + 0.0 for key in ("gap", "low", "high"))  # + 0.0: no "-0.000"
    return f"{gap:+.3f} [{low:+.3f}, {high:+.3f}] at {axis} {pair['at']:.2f}"


def _below(pairs: Sequence[Mapping[str, Any]], axis: str) -> str:
    """The others that ours lies below, listed, the worst first; empty if there are none."""
    return "; ".join(
        f"{pair['other']} ({pair['other cost']:.2f} times, {_gap(pair, axis)}{', within the interval' if pair['within the interval'] else ''})"
        for pair in sorted(pairs, key=lambda pair: pair["gap"])
        if not pair["on or above"]
    )


def _near(pairs: Sequence[Mapping[str, Any]], axis: str) -> str:
    """What is true of the part of the others' curves that ours reaches, where that is not all of it."""
    found = [(pair["other"], pair["within reach"]) for pair in pairs if pair["within reach"] is not None]
    if not found or all(pair["reached"] == 1 for pair in pairs):
        return ""
    name, least = min(found, key=lambda one: one[1]["gap"])
    return (
        f" (where it has points itself its least lead is {least['gap']:+.3f} at {axis} {least['at']:.2f}, over {name})"
    )


def sentence(pairs: Sequence[Mapping[str, Any]], axis: str) -> str:
    """What the pairs of one of ours with published peers say."""
    name, cost = pairs[0]["ours"], pairs[0]["cost"]
    known = [pair for pair in pairs if pair["gap"] is not None]
    cheap, dear = [p for p in known if affordable(p)], [p for p in known if not affordable(p)]
    start = f"{name} ({cost:.2f} times plain cost), {axis} below {BELOW:g}:"
    if not known:
        return f"{start} no peer's curve gets there."
    if below := _below(cheap, axis):
        text = f"{start} of {len(cheap)} peers of at most plain cost that get there it lies below {below}{_near(cheap, axis)}"
    elif cheap:
        least = min(cheap, key=lambda pair: pair["gap"])
        text = f"{start} on or above all {len(cheap)} peers of at most plain cost that get there; least lead {_gap(least, axis)}, over {least['other']}"
    else:
        text = f"{start} no peer of at most plain cost gets there"
    if below := _below(dear, axis):
        return f"{text}; and below the dearer {below}."
    return f"{text}; below none of the {len(dear)} dearer ones." if dear else f"{text}."
