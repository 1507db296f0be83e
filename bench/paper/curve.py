"""Similarity against faithfulness over guidance scales, and who lies above whom.

A method's curve is the polyline through its points (x, y) = (mean similarity, mean faithfulness of ALL its images), one a guidance
scale, in the order of the scales. What a method offers at similarity x is

    E(x) = max { y : (x', y) on its polyline, x' <= x }:

an image that is less similar to the training image is no worse. Where the polyline has no point at or below x, E(x) is the floor, the
lowest faithfulness that any method had: a curve that never gets there is not excused. A curve lies on or above another if
E(x) >= y at every point (x, y) of the other's polyline (each segment in tenths); what differs by at most 1e-4 counts as equal, in x
and in y, or the same arithmetic in another order would not be "on" its own curve. Intervals are pointwise, 95%, from a bootstrap over
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


def compare(ours: Curve, theirs: Curve, floor: float) -> dict[str, Any]:
    """The least E_ours(x) - y over the other's polyline, where it is, its interval, and whether `ours` is on or above.

    reached  share of the other's points at whose similarity `ours` has a point at all
    """
    x, y = theirs.samples()
    gaps = [ours.offers(x[:, t], floor) - y[:, t] for t in range(x.shape[1])]
    worst = int(np.argmin([gap[0] for gap in gaps]))
    low, high = np.percentile(gaps[worst][1:], [2.5, 97.5])
    return {
        "gap": float(gaps[worst][0]),
        "low": float(low),
        "high": float(high),
        "at": float(x[0, worst]),
        "reached": float(np.mean(ours.x[0].min() <= x[0] + SAME)),
        "on or above": bool(gaps[worst][0] >= -SAME),
        "within the interval": bool(high >= 0),
    }


def verdict(
    found: Mapping[str, Curve],
    cost: Mapping[str, float],
    ours: Sequence[str],
    peers: Sequence[str],
    plain: str = "none",
) -> dict[str, Any]:
    """The best of `ours` at no more than plain guidance's cost against every published peer, and against plain guidance itself.

    The best is the one whose least gap to the peers of at most that cost is the greatest. It is chosen on the very images that it is
    compared on, which favours it; the page says so.
    """
    ours = [name for name in ours if name in found and cost[name] <= 1 + 1e-6]
    peers = [name for name in peers if name in found and name != plain]
    cheap = [name for name in peers if cost[name] <= 1 + 1e-6]
    if not ours or not cheap:
        return {"possible": False, "reason": "no preset of at most plain cost" if not ours else "no peer of that cost"}
    floor = float(min(curve.y[0].min() for curve in found.values()))

    def against(name: str, others: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {other: {**compare(found[name], found[other], floor), "cost": cost[other]} for other in others}

    every = {name: against(name, cheap) for name in ours}
    least = {name: min(cell["gap"] for cell in cells.values()) for name, cells in every.items()}
    best = max(ours, key=lambda name: least[name])
    return {
        "possible": True,
        "best": best,
        "cost": cost[best],
        "holds": all(cell["on or above"] for cell in every[best].values()),
        "holds within the intervals": all(c["on or above"] or c["within the interval"] for c in every[best].values()),
        "cheap": every[best],
        "dear": against(best, [peer for peer in peers if peer not in cheap]),
        "plain": against(best, [plain] if plain in found else []),
        "presets": least,
    }


def _gap(cell: Mapping[str, Any], axis: str) -> str:
    gap, low, high = (round(cell[key], 3) + 0.0 for key in ("gap", "low", "high"))  # + 0.0: no "-0.000"
    return f"{gap:+.3f} [{low:+.3f}, {high:+.3f}] at {axis} {cell['at']:.2f}"


def _below(cells: Mapping[str, Mapping[str, Any]], axis: str) -> str:
    """The peers that the preset lies below, listed; empty if there are none."""
    return "; ".join(
        f"{peer} ({_gap(cell, axis)}{', within the interval' if cell['within the interval'] else ''})"
        for peer, cell in cells.items()
        if not cell["on or above"]
    )


def _in_short(which: str, result: Mapping[str, Any], axis: str) -> str:
    """A further verdict in a sentence."""
    below = _below(result["cheap"], axis)
    where = f"lies below {below}" if below else "is on or above every peer's of at most that cost"
    dear = _below(result["dear"], axis)
    return f"{which} the best preset is {result['best']}: its curve {where}" + (
        f"; dearer peers that are better somewhere: {dear}." if dear else "."
    )


def _share(cell: Mapping[str, float]) -> str:
    return f"{cell['mean']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"


def sentences(result: Mapping[str, Any], axis: str) -> list[str]:
    """The verdict in words, every one of them from the numbers."""
    if not result["possible"]:
        return [f"Against {axis} the comparison cannot be made: {result['reason']}."]

    verb, lead = "is NOT", ""
    if result["holds"]:
        peer, cell = min(result["cheap"].items(), key=lambda item: item[1]["gap"])
        verb, lead = "is", f"; its least lead is {_gap(cell, axis)}, over {peer}"
    text = [
        f"The {axis}-against-faithfulness curve of the best preset at no more than 1.0 times plain cost "
        f"({result['best']}, {result['cost']:.2f} times) {verb} on or above every peer's of at most that cost ({', '.join(result['cheap'])}){lead}."
    ]
    if below := _below(result["cheap"], axis):
        text.append(f"It lies below: {below}.")
    for cell in result["plain"].values():
        where = "on or above" if cell["on or above"] else "below"
        note = ", within the interval" if not cell["on or above"] and cell["within the interval"] else ""
        text.append(f"It is {where} that of plain guidance itself (least lead {_gap(cell, axis)}{note}).")
    dear = {peer: cell for peer, cell in result["dear"].items() if not cell["on or above"]}
    if dear:
        listed = "; ".join(
            f"{peer} at {cell['cost']:.2f} times plain cost ({_gap(cell, axis)})" for peer, cell in dear.items()
        )
        text.append(f"Dearer peers that are better somewhere: {listed}.")
    elif result["dear"]:
        text.append(f"Of the dearer peers ({', '.join(result['dear'])}) none is better anywhere.")
    else:
        text.append("No dearer peer was run.")
    if (ordinary := result.get("ordinary")) is not None:
        text.append(
            f"What it does to ordinary prompts: faithful {_share(ordinary['best'])}, under plain guidance {_share(ordinary['plain'])}."
        )
    if (strict := result.get("strict")) is not None:
        text.append(_in_short("With blown-up images counted as not faithful", strict, axis))
    if (gated := result.get("gated")) is not None:
        text.append(_in_short("Of those that leave ordinary prompts alone, the gated ones,", gated, axis))
    if len(result["presets"]) > 1:
        text.append(
            f"The best of {len(result['presets'])} presets was chosen on the same images that it is compared on, which favours it."
        )
    return text
