"""The plots of docs/testbed: presets, gate, rules, curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from .grid import noise, timesteps


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


def _apart(figure: Figure, labels: list[Annotation]) -> None:
    """From the lowest point on, raise every label that covers an earlier one until it does not."""
    figure.draw_without_rendering()  # else the layout, and with it where texts are, is not known yet
    placed: list[Bbox] = []
    for label in sorted(labels, key=lambda one: one.xy[1]):
        while any(label.get_window_extent().overlaps(box) for box in placed):
            x, y = label.get_position()
            label.set_position((x, y + 1))  # points
        placed.append(label.get_window_extent())


def presets(path: Path, results: dict) -> None:
    """Copy rate against faithfulness of what is no copy, a point a preset (D prompts)."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.add_subplot()
    labels = []
    for name, cells in results["main"].items():
        c = cells["D"]
        if (free := c["faithful, no copies"]) is None:
            continue
        x, y = c["copies"], free
        axis.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            fmt="o",
            elinewidth=0.6,
        )
        labels.append(axis.annotate(name, (x["mean"], y["mean"]), xytext=(4, 4), textcoords="offset points", size=8))
    ordinary = results["ordinary, plain guidance"]["faithful"]["mean"]
    axis.axhline(ordinary, ls="--", color="0.5", lw=1)
    axis.axhline(0.8 * ordinary, ls=":", color="0.5", lw=1)
    axis.set(
        xlabel="copies",
        ylabel="faithful, of the images that are no copies",
        title="Memorized D test prompts (dashed: ordinary prompts; dotted: 0.8 of that)",
    )
    _apart(figure, labels)
    _save(figure, path)


def gate(path: Path, results: dict, memorized: list[dict], ordinary: list[dict]) -> None:
    """Distribution of RMS(c - u) at the first step."""
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.add_subplot()

    def first(rows: list[dict]) -> list[float]:
        return [(r["d_curve"][0] / 512) ** 0.5 for r in rows]

    groups = {
        "ordinary": first(ordinary),
        "memorized D": first([r for r in memorized if r["kind"] == "D"]),
        "memorized T": first([r for r in memorized if r["kind"] == "T"]),
    }
    everything = np.concatenate(list(groups.values()))
    bins = np.geomspace(everything.min(), everything.max(), 50)
    for (name, values), colour in zip(groups.items(), ("C0", "C3", "C1"), strict=True):
        axis.hist(values, bins, alpha=0.6, label=name, color=colour)
    axis.axvline(results["gate"]["threshold"], color="k", ls="--", lw=1, label="gate")
    axis.set_xscale("log")
    axis.set(xlabel="RMS(c - u) at the first step", ylabel="images")
    axis.legend(fontsize=8)
    _save(figure, path)


def rules(path: Path, results: dict) -> None:
    """Copy rate against faithfulness for every candidate, a colour a family."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.add_subplot()
    families = dict.fromkeys(r["family"] for r in results["rules"])
    for family, marker in zip(families, "os^v", strict=True):
        part = [r for r in results["rules"] if r["family"] == family and r["faithful"] is not None]
        part.sort(key=lambda r: r["copies"])
        line = "-" if family != "minimum" else ""
        axis.plot(
            [r["copies"] for r in part],
            [r["faithful"] for r in part],
            line + marker,
            ms=4,
            lw=0.8,
            label=family,
        )
    axis.axhline(results["ordinary, plain guidance"]["faithful"]["mean"], ls="--", color="0.5", lw=1)
    axis.set(
        xlabel="copies",
        ylabel="faithful, of the images that are no copies",
        title="Transition rules on D test prompts (dashed: ordinary prompts)",
    )
    axis.legend(fontsize=8)
    _save(figure, path)


def curves(path: Path, never: list[dict], cfg: list[dict], ordinary: list[dict], pipe: Any) -> None:
    """Median and quartiles of d, and of d in x0 space, by timestep."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    t, factor = np.array(timesteps(pipe)), noise(pipe)
    groups = {
        "memorized D, zero guidance": ([r for r in never if r["kind"] == "D"], "C3"),
        "memorized D, plain guidance": ([r for r in cfg if r["kind"] == "D"], "C1"),
        "ordinary, plain guidance": (ordinary, "C0"),
    }
    titles = ("d = |c - u|^2", "in x0 space, d (1 - abar) / abar")
    for axis, scale, title in zip(figure.subplots(1, 2), (1.0, factor), titles, strict=True):
        for name, (rows, colour) in groups.items():
            d = np.array([r["d_curve"] for r in rows], float) * scale
            low, middle, high = np.percentile(d, [25, 50, 75], 0)
            axis.plot(t, middle, color=colour, label=name)
            axis.fill_between(t, low, high, color=colour, alpha=0.2)
        axis.set_yscale("log")
        axis.set(xlabel="timestep t", title=title)
        axis.invert_xaxis()
    figure.axes[0].legend(fontsize=8)
    _save(figure, path)
