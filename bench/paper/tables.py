"""The tables as heads and rows of text; report.py makes Markdown and HTML of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.paper.published import DIFFERS, ROWS, SETTINGS
from bench.testbed.stats import FEW


@dataclass(frozen=True)
class Table:
    """title, column heads, rows of text, and lines that stand below."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def interval(cell: Mapping[str, float] | None, form: str = ".2f") -> str:
    """A mean with its interval, or a dash."""
    return "-" if cell is None else f"{cell['mean']:{form}} [{cell['low']:{form}}, {cell['high']:{form}}]"


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


COST = (
    "rows / plain: rows of the denoiser's batches, probes and the forward half of gradient steps included, relative to plain guidance. "
    "What Wen's has above 1.00 are gradient steps, each with a backward pass besides, about twice the work of its rows. Seconds: wall "
    "clock of the whole call, one run in batches, beside whatever else the machine did."
)
COLUMNS = (  # column of the rows, head, what is shown
    ("copy", "copies", "interval"),
    ("similarity", "own p95 / mean / above 0.5", "spread"),
    ("similarity_set", "whole set p95 / mean / above 0.5", "spread"),
    ("sscd", "SSCD own p95 / mean / above 0.5", "spread"),
    ("sscd_set", "SSCD whole set p95 / mean / above 0.5", "spread"),
    ("faithful", "faithful", "interval"),
    ("faithful, no copy", "faithful, of what is no copy", "counted"),
    ("faithful5", "faithful, first five", "interval"),
    ("clip", "CLIP score", "interval"),
    ("blown", "blown up", "interval"),
)


def _shown(cell: Any, kind: str) -> str:
    if cell is None:
        return "-"
    if kind == "spread":
        return f"{cell['p95']:.3f} / {cell['mean']:.3f} / {cell['above']:.0%}"
    return interval(cell) + (f" n={cell['images']}" if kind == "counted" else "")


def methods_table(
    title: str, cells: Mapping[str, Mapping[str, Any]], networks: Mapping[str, str], fid: Mapping[str, Any], group: str
) -> Table:
    """A row a method: cost, seconds, every measure with a letter that names its network."""
    have = {name for cell in cells.values() for name in cell if cell[name] is not None}
    if group == "ordinary":
        have -= {"copy", "similarity", "sscd", "faithful, no copy"}
    columns = [one for one in COLUMNS if one[0] in have]
    letters: dict[str, str] = {}

    def mark(column: str) -> str:
        network = networks.get(column.removesuffix(", no copy"))
        return f" ({letters.setdefault(network, chr(97 + len(letters)))})" if network else ""

    head = [
        "method",
        "images",
        "rows / plain",
        "s / plain",
        "s / image",
        *(text + mark(name) for name, text, _ in columns),
    ]
    with_fid = group in fid.get("values", {})
    if with_fid:
        head.append("FID" + f" ({letters.setdefault(fid['network'], chr(97 + len(letters)))})")
    caught = "caught" in have
    head += ["caught by the gate"] if caught else []
    rows = []
    for name, cell in cells.items():
        line = [name, str(cell["images"]), number(cell["cost"]), number(cell["slower"]), f"{cell['seconds']:.3f}"]
        line += [_shown(cell.get(column), kind) for column, _, kind in columns]
        if with_fid:
            line.append(number(fid["values"][group].get(name)))
        if caught:
            line.append(number(cell.get("caught"), ".0%"))
        rows.append(line)
    notes = [*(f"({letter}) {network}" for network, letter in letters.items()), COST]
    if with_fid and fid["notes"][group]:
        notes.append(f"FID: {fid['notes'][group]}.")
    broken = {name: cell["not finite"] for name, cell in cells.items() if cell["not finite"]}
    if broken:
        notes.append("Images whose latents are not finite: " + ", ".join(f"{k} {v}" for k, v in broken.items()) + ".")
    notes.append(
        f"Intervals: 95%, bootstrap over prompts; where fewer than {FEW} prompts have or lack what is counted, exact, as if each prompt were one image."
    )
    return Table(title, head, rows, notes)


def detection_table(cells: Sequence[Mapping[str, Any]]) -> Table:
    """AUC and TPR by steps and seeds."""
    rows = [
        [
            str(c["steps"]),
            str(c["seeds"]),
            interval(c["auc"], ".3f"),
            interval(c["tpr"]),
            f"{c['memorized']} / {c['ordinary']}",
        ]
        for c in cells
    ]
    return Table(
        "Detection: RMS(c - u) under plain guidance, memorized against ordinary prompts",
        ["steps", "seeds", "AUC", "TPR at 1% FPR", "prompts"],
        rows,
        [
            "Network: the model's own denoiser. The statistic is the mean over the first steps and over the seeds; every disjoint group "
            "of seeds is an example. Intervals: 95%, bootstrap over prompts. With fewer than 100 ordinary prompts and one group each "
            "1% FPR means no false alarm at all."
        ],
    )


def comparison_table(
    result: Mapping[str, Any], axis: str, networks: Mapping[str, str], cells: Mapping[str, Mapping[str, Any]]
) -> Table:
    """The best preset against every peer: the least lead along the peer's curve. `cells`: the table of memorized prompts."""
    rows = []
    for some in (result["cheap"], result["plain"], result["dear"]):
        for name, c in sorted(some.items(), key=lambda item: item[1]["gap"]):
            where = (
                "on or above"
                if c["on or above"]
                else "below" + (", within the interval" if c["within the interval"] else "")
            )
            rows.append(
                [
                    name,
                    f"{c['cost']:.2f}",
                    number(cells[name]["slower"]),
                    f"{c['gap']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]",
                    f"{c['at']:.2f}",
                    f"{c['reached']:.0%}",
                    where,
                ]
            )
    column = "similarity" if axis == "similarity" else "copy"
    return Table(
        f"{result['best']} against every peer and plain guidance, faithfulness at equal {axis}",
        [
            "peer",
            "rows / plain",
            "s / plain",
            "least lead of the preset",
            f"at {axis}",
            "peer's curve within reach",
            "the preset is",
        ],
        rows,
        [
            f"{axis}: {networks[column]}. faithfulness: {networks['faithful']}. Lead: what the preset offers at the peer's {axis} or "
            "lower minus the peer's faithfulness, at the point of the peer's curve where it is least; where the preset has no point that "
            "low it counts as having the lowest faithfulness of all. Pointwise 95% intervals, bootstrap over prompts.",
            COST,
            "All presets of at most plain cost by their least lead over the peers of at most plain cost: "
            + ", ".join(f"{k} {v:+.3f}" for k, v in sorted(result["presets"].items(), key=lambda i: -i[1]))
            + ".",
        ],
    )


def points_table(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], cost: Mapping[str, float], networks: Mapping[str, str]
) -> Table:
    """Every point of the plot."""
    rows = [
        [
            *(name, f"{cost[name]:.2f}", f"{p['scale']:g}", interval(p["x"]), interval(p["y"])),
            number(p.get("blown"), ".0%"),
        ]
        for name, points in curves.items()
        for p in points
    ]
    return Table(
        "Every point of the curves",
        ["method", "rows / plain", "guidance scale", "similarity", "faithful", "blown up"],
        rows,
        [f"similarity: {networks['similarity']}. faithful: {networks['faithful']}. Memorized prompts."],
    )


def published_table(cells: Mapping[str, Mapping[str, Any]], networks: Mapping[str, str]) -> Table:
    """The paper's numbers beside ours: the change of the 95th percentile against 'none' is what can be compared."""
    before = {setting: value for setting, name, _, value, _, _ in ROWS if name == "none"}
    near = {"random words": "random-words", "random numbers": "random-numbers", "Ren": "ren"}
    p95 = {name: cell["similarity_set"]["p95"] for name, cell in cells.items() if cell.get("similarity_set")}
    rows: list[list[str]] = []
    instead: list[str] = []
    for setting, theirs, ours, value, clip, fid in ROWS:
        names = [n for n in p95 if n.startswith("wen-")] if ours == "Wen" else [near.get(ours, ours)]
        bounded = ours.removeprefix("paper-")
        if ours not in p95 and bounded != ours and bounded in p95:
            names, instead = [bounded], [*instead, f"{bounded} for {ours}"]
        here = [
            f"{n} {p95[n]:.3f}" + (f" ({p95[n] / p95['none'] - 1:+.0%})" if n != "none" and p95["none"] else "")
            for n in names
            if n in p95
        ]
        change = "" if theirs == "none" else f" ({value / before[setting] - 1:+.0%})"
        rows.append(
            [setting, theirs, f"{value:.4f}{change}", number(clip, ".4f"), f"{fid:.2f}", "; ".join(here) or "-"]
        )
    notes = ["; ".join(f"{k}: {v}" for k, v in SETTINGS.items()) + ".", DIFFERS]
    if "similarity_set" in networks:
        notes.append(
            f"Ours: {networks['similarity_set']}, maximum over the whole training set, 95th percentile; in brackets the change."
        )
    if instead:
        notes.append(f"Not run, so another of ours stands there: {', '.join(instead)}.")
    return Table(
        "Published by Jain et al. (theirs) beside ours",
        ["setting (theirs)", "method (theirs)", "Sim95 (theirs)", "CLIP (theirs)", "FID (theirs)", "p95 (ours)"],
        rows,
        notes,
    )
