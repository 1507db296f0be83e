"""The plots of the page: curves of d, pictures. The curves over guidance scales are in tradeoff.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def save(figure: Figure, path: Path) -> Path:
    """The same numbers give the same file: without a date and with fixed names of its parts."""
    with matplotlib.rc_context({"svg.hashsalt": "paper"}):
        figure.savefig(path, metadata={"Date": None})
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
    return save(figure, path)


def first_prediction(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Shares of first conditional predictions by similarity, a colour a kind of prompt: to their own training image, else to the nearest one."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        own = row.get("similarity") is not None
        if (value := row["similarity" if own else "similarity_set"]) is not None:
            groups.setdefault(f"{row['kind']}: {'own' if own else 'nearest'} training image", []).append(value)
    if not groups:
        return None
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis = figure.add_subplot()
    for place, (name, values) in enumerate(groups.items()):
        style = {
            "bins": np.linspace(-0.5, 1, 46),
            "weights": np.full(len(values), 1 / len(values)),
            "color": f"C{place}",
        }
        axis.hist(values, histtype="step", lw=1.6, label=f"{name} ({len(values)} noises)", **style)
        axis.axvline(float(np.median(values)), color=f"C{place}", lw=0.8, ls="--")
    axis.set(
        xlabel="similarity of x0(c) at the first row",
        ylabel="share",
        title="first conditional predictions; dashed: medians",
    )
    axis.legend(fontsize=8)
    return save(figure, path)


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
