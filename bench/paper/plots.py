"""The plots of the page: curves over guidance scales, curves of d, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

MARKERS = "osD^v<>PX*hp"


def tradeoff(
    path: Path,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    cost: Mapping[str, float],
    ours: Sequence[str],
    best: str | None,
    axis: str,
    faithful: str,
) -> Path:
    """A line a method through its guidance scales; left our presets, right the peers with the best preset among them."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    others = [name for name in curves if name not in ours]
    first = [name for name in others if name == "none"]
    for panel, names in (
        (left, [*first, *(n for n in curves if n in ours)]),
        (right, [*([best] if best else []), *others]),
    ):
        for place, name in enumerate(names):
            points = curves[name]
            x, y = [p["x"]["mean"] for p in points], [p["y"]["mean"] for p in points]
            colour = "black" if name == "none" else "C3" if name == best else f"C{(place % 9) + (place % 9 >= 3)}"
            style = {"marker": MARKERS[place % len(MARKERS)], "ms": 4, "lw": 2 if name in ("none", best) else 1}
            panel.plot(x, y, color=colour, label=f"{name} ({cost[name]:.2f}x rows)", **style)
            if name in ("none", best):
                spread = [[p["y"]["mean"] - p["y"]["low"], p["y"]["high"] - p["y"]["mean"]] for p in points]
                panel.errorbar(x, y, yerr=np.array(spread).clip(0).T, fmt="none", ecolor=colour, elinewidth=0.6)
                for p, a, b in zip(points, x, y, strict=True):
                    panel.annotate(f"{p['scale']:g}", (a, b), xytext=(4, 4), textcoords="offset points", size=7)
        panel.set_xlabel(f"{axis} (lower is better)")
        panel.legend(fontsize=7)
    left.set_ylabel(f"faithfulness ({faithful}; higher is better)", fontsize=8)
    left.set_title("plain guidance and the presets")
    right.set_title("plain guidance, the peers" + (f", and {best}" if best else ""))
    figure.savefig(path, dpi=100)
    return path


def d_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Median and quartiles of RMS(c - u) by timestep under plain guidance, a colour a kind of prompt; None without curves."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["details"].get("d_curve"):
            groups.setdefault(row["kind"], []).append(row["details"])
    if not groups:
        return None
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axis = figure.add_subplot()
    for place, (kind, some) in enumerate(groups.items()):
        d = np.array([one["d_curve"] for one in some], float) / some[0]["elements"]
        t = some[0]["timesteps"]
        low, middle, high = np.nanpercentile(np.sqrt(d), [25, 50, 75], 0)
        axis.plot(t, middle, color=f"C{place}", label=f"{kind} ({len(some)} images)")
        axis.fill_between(t, low, high, color=f"C{place}", alpha=0.2)
    axis.set_yscale("log")
    axis.set(xlabel="timestep t", ylabel="RMS(c - u)", title="plain guidance: median and quartiles")
    axis.invert_xaxis()
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    return path


def grid(
    path: Path,
    prompts: Sequence[str],
    training: Sequence[Image.Image | None],
    methods: Sequence[str],
    pictures: Sequence[Sequence[Image.Image | None]],
) -> Path:
    """A row a prompt: its training image, then a column a method, all from the same noise. pictures[prompt][method]."""
    columns = ["training", *methods]
    figure = Figure(figsize=(0.95 * len(columns) + 3.1, 1.0 * len(prompts) + 0.9))
    axes = figure.subplots(len(prompts), len(columns), squeeze=False)
    for r, prompt in enumerate(prompts):
        for c, (name, picture) in enumerate(zip(columns, [training[r], *pictures[r]], strict=True)):
            axis = axes[r, c]
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if picture is not None:
                small = picture.convert("RGB")
                small.thumbnail((128, 128))
                axis.imshow(np.asarray(small))
            if r == 0:
                axis.set_title(name, fontsize=9, rotation=30, ha="left")
        axes[r, 0].set_ylabel(_wrapped(prompt), rotation=0, ha="right", va="center", fontsize=9)
    width, height = figure.get_size_inches()
    figure.subplots_adjust(2.3 / width, 0.01, 1 - 0.8 / width, 1 - 0.8 / height, 0.04, 0.04)
    figure.savefig(path, dpi=110)
    return path


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(textwrap.shorten(text, 70, placeholder="..."), 24))
