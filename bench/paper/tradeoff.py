"""The plot of faithfulness against similarity: a line a method, each labelled where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.paper.plots import save

PLAIN, PRESET = "none", "cfg"  # the same images
# Twelve colours that are told apart, dark enough for text on white; further methods of a panel take them again, dashed.
COLOURS = (
    "#1f77b4",
    "#c45100",
    "#1a7f37",
    "#8250df",
    "#b3261e",
    "#7a5c00",
    "#00798c",
    "#c2185b",
    "#5c6b00",
    "#4059ad",
    "#9c5a3c",
    "#5f6368",
)
DASHES = ("-", "--", ":")
MARKERS = dict(zip(DASHES, "os^", strict=True))  # a curve of one point has no line
GAP = 0.034  # least distance of two labels, as a share of the axis
ROOM = 0.25  # for them, as a share of the width


def tradeoff(
    path: Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    ours: Sequence[str],
    focus: Sequence[str],
    axis: str,
    faithful: str,
) -> Path:
    """Left our presets, right the peers with `focus` among them, which have the same colours there. Written as `path`'s ending says."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    names = [PLAIN, *focus, *(name for name in curves if name not in (PLAIN, PRESET, *focus))]
    shown_left = [name for name in names if name in curves and (name in ours or name == PLAIN)]
    shown_right = [name for name in names if name in curves and (name in focus or name not in ours)]
    styles = styles_of(shown_left), styles_of(shown_right)
    for panel, style, title in (
        (left, styles[0], "plain guidance (none) and ours"),
        (right, styles[1], "plain guidance, published peers, and ours that ship"),
    ):
        for name in style:
            line(panel, curves[name], *style[name], strong=name in (PLAIN, *focus))
        panel.axvline(0.5, color="0.85", zorder=0)
        panel.set_xlabel(f"{axis} (lower is better)")
        panel.set_title(title)
    low, high = left.get_xlim()
    left.set_xlim(low, high + ROOM * (high - low))
    left.set_xticks([tick for tick in left.get_xticks() if low <= tick <= high])
    for panel, style in zip((left, right), styles, strict=True):
        label(panel, {name: curves[name] for name in style}, style)
    left.set_ylabel(f"faithful and not blown up (higher is better)\n{faithful}", fontsize=9)
    return save(figure, path)


def styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and dashes of the methods of a panel: plain guidance black, the others a colour each as long as there are some."""
    rest = [name for name in names if name != PLAIN]
    pairs = [(COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]) for k in range(len(rest))]
    return {name: ("black", "-") for name in names if name == PLAIN} | dict(zip(rest, pairs, strict=True))


def line(panel: Any, points: Sequence[Mapping[str, Any]], colour: str, dash: str, strong: bool) -> None:
    """A method's points with their intervals, its scales beside them where it is `strong`."""
    x, y = ([p[side]["mean"] for p in points] for side in "xy")
    panel.plot(
        x, y, color=colour, linestyle=dash, marker=MARKERS[dash], ms=4 if strong else 2.5, lw=2.2 if strong else 1
    )
    if strong:
        spread = [[p["y"]["mean"] - p["y"]["low"], p["y"]["high"] - p["y"]["mean"]] for p in points]
        panel.errorbar(x, y, yerr=np.array(spread).clip(0).T, fmt="none", ecolor=colour, elinewidth=0.5)
        for p, a, b in zip(points, x, y, strict=True):
            panel.annotate(f"{p['scale']:g}", (a, b), xytext=(4, 4), textcoords="offset points", size=7, color=colour)


def label(panel: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]], style: Mapping[str, tuple[str, str]]) -> None:
    """Names at the right edge, as high as each curve ends there, moved apart, a thin line to the end."""
    ends = {name: (points[-1]["x"]["mean"], points[-1]["y"]["mean"]) for name, points in curves.items()}
    (low, high), edge = panel.get_ylim(), panel.get_xlim()[1]
    gap = GAP * (high - low)
    heights = apart([ends[name][1] for name in ends], gap, low + gap / 2, high - gap)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        panel.annotate(
            name,
            end,
            xytext=(edge - 0.8 * ROOM / (1 + ROOM) * np.ptp(panel.get_xlim()), height),
            va="center",
            size=8,
            color=style[name][0],
            arrowprops={"arrowstyle": "-", "color": style[name][0], "lw": 0.4, "alpha": 0.6},
        )


def apart(heights: Sequence[float], gap: float, least: float, most: float) -> list[float]:
    """The heights moved, their order kept, so that no two are nearer than `gap`, none is above `most` and, if they fit, none below `least`."""
    order = np.argsort(heights, kind="stable")
    placed = np.asarray(heights, float)[order].clip(least)
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap)
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], most - gap * (len(placed) - 1 - k))
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()
