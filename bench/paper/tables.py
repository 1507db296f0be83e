"""The tables as heads and rows of text; report.py makes Markdown and HTML of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.paper.curve import BELOW, affordable
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


def seconds_ratio(cell: Mapping[str, Any]) -> str:
    """Seconds over plain guidance's, median and quartiles; a dash where they were not measured by turns."""
    if (pairs := cell.get("seconds ratio")) is None:
        return "-"
    return f"{pairs['median']:.2f} [{pairs['low']:.2f}, {pairs['high']:.2f}]"


COST = (
    "rows / plain: rows of the denoiser's batches, probes and the forward half of gradient steps included, relative to plain guidance. "
    "What Wen's and han-sample have above 1.00 are gradient steps, each with a backward pass besides, about twice the work of its rows; "
    "backward passes: how many of them an image took part in. "
    "s / plain: seconds of a call that makes the first memorized prompts' images, at most four, over those of plain guidance for the same, "
    "measured by turns: median [quartiles]. none is plain guidance over itself, and shows how even the machine was; -: not measured."
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
    """A row a method: cost, every measure with a letter that names its network; seconds beside the memorized prompts, with which they were taken."""
    have = {name for cell in cells.values() for name in cell if cell[name] is not None}
    if group == "ordinary":
        have -= {"copy", "similarity", "sscd", "faithful, no copy"}
    columns = [one for one in COLUMNS if one[0] in have]
    letters: dict[str, str] = {}

    def mark(column: str) -> str:
        network = networks.get(column.removesuffix(", no copy"))
        return f" ({letters.setdefault(network, chr(97 + len(letters)))})" if network else ""

    timed = ["s / plain"] if group == "memorized" else []
    backward = ["backward passes"] if "backward" in have else []
    head = ["method", "images", "rows / plain", *backward, *timed, *(text + mark(name) for name, text, _ in columns)]
    with_fid = group in fid.get("values", {})
    if with_fid:
        head.append("FID" + f" ({letters.setdefault(fid['network'], chr(97 + len(letters)))})")
    caught = "caught" in have
    head += ["caught by the gate"] if caught else []
    rows = []
    for name, cell in cells.items():
        line = [name, str(cell["images"]), number(cell["cost"]), *(number(cell.get("backward")) for _ in backward)]
        line += [seconds_ratio(cell) for _ in timed]
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
    """AUC and TPR by statistic and number of noises."""
    rows = [
        [
            c["statistic"],
            str(c["seeds"]),
            str(c["rows"]) + (f" + {c['extra']}" if c["extra"] else ""),
            interval(c["auc"], ".3f"),
            *(interval(cell) for cell in c["tpr"].values()),
            f"{c['memorized']} / {c['ordinary']}",
        ]
        for c in cells
    ]
    few = min(c["ordinary groups"] for c in cells)
    return Table(
        "Detection under plain guidance, memorized against ordinary prompts",
        [
            "statistic",
            "noises",
            "rows a noise",
            "AUC",
            *(f"TPR at {float(r):.1%} FPR" for r in cells[0]["tpr"]),
            "prompts",
        ],
        rows,
        [
            "Network: the model's own denoiser. The statistic is a mean over the noises; every disjoint group of noises is an example. "
            f"Intervals: 95%, bootstrap over prompts. At the greatest number of noises there are {few} ordinary examples: where that is "
            "fewer than 100 (1,000), 1% (0.1%) FPR means no false alarm at all. Rows: those evaluated when the number is known, + those "
            "that plain guidance does not evaluate anyway. Sources: "
            + "; ".join(dict.fromkeys(f"{c['statistic']}: {c['source']}" for c in cells))
            + "."
        ],
    )


def first_prediction_table(found: Mapping[str, Mapping[str, Any]], networks: Mapping[str, str]) -> Table:
    """Whether the first conditional prediction shows the picture."""
    rows = [
        [
            kind,
            str(c["images"]),
            "own" if c["of"] == "similarity" else "whole set",
            f"{c['median']:.2f} [{c['quartiles'][0]:.2f}, {c['quartiles'][1]:.2f}]",
            interval(c["copy"]),
        ]
        for kind, c in found.items()
    ]
    return Table(
        "Does the first conditional prediction show the picture?",
        ["prompts", "noises in all", "training images", "similarity: median [quartiles]", "counts as a copy"],
        rows,
        [
            "x0(c) at the first row, before any step, as if it were the image. Anchored guidance and one-step extraction rest on it. "
            f"similarity: {networks['similarity']}."
        ],
    )


def _worst(leads: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    name, least = min(leads, key=lambda one: one[1]["gap"], default=("", None))
    return "-" if least is None else f"{least['gap']:+.3f}, {name} at {least['at']:.2f}"


def _lead(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['gap']:+.3f} at {found['at']:.2f}"


def verdict_table(
    pairs: Sequence[Mapping[str, Any]], axis: str, networks: Mapping[str, str], cells: Mapping[str, Mapping[str, Any]]
) -> Table:
    """Who is on or above whom, by how much, at what cost: one of ours against every peer, the least lead along the peer's curve."""
    rows = []
    for pair in sorted(pairs, key=lambda one: (list(cells).index(one["ours"]), one["gap"] is None, one["gap"] or 0)):
        if pair["gap"] is None:
            lead = ["-", "-", "-", "-", "the peer never gets there"]
        else:
            where = "on or above" if pair["on or above"] else "below"
            if not pair["on or above"] and pair["within the interval"]:
                where += ", within the interval"
            lead = [
                f"{pair['gap']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]",
                f"{pair['at']:.2f}",
                f"{pair['reached']:.0%}",
                _lead(pair["within reach"]),
                where,
            ]
        cost = f"{pair['other cost']:.2f}"
        rows.append([pair["ours"], pair["other"], cost, seconds_ratio(cells[pair["other"]]), *lead])
    column = "similarity" if axis == "similarity" else "copy"
    return Table(
        f"Who is on or above whom, {axis} below {BELOW:g}; blown-up images count as not faithful",
        [
            "ours",
            "peer",
            "peer's rows / plain",
            "peer's s / plain",
            "least lead",
            f"at {axis}",
            "peer's curve within reach",
            "least lead there",
            "ours is",
        ],
        rows,
        [
            f"{axis}: {networks[column]}. faithfulness: {networks['faithful']}. Lead: what ours offers at the peer's {axis} or "
            "lower minus the peer's faithfulness, at the point of the peer's curve where it is least; where ours has no point that "
            "low it counts as having the lowest faithfulness of all; within reach: only where it has one. Pointwise 95% intervals, bootstrap over prompts.",
            COST,
        ],
    )


def overview_table(
    pairs: Sequence[Mapping[str, Any]],
    axis: str,
    cells: Mapping[str, Mapping[str, Any]],
    ordinary: Mapping[str, Mapping[str, Any]],
) -> Table:
    """A row for each of ours: its worst peer of at most plain cost, its worst dearer one, and what it does to ordinary prompts."""
    rows = []
    for name in dict.fromkeys(pair["ours"] for pair in pairs):
        mine = [p for p in pairs if p["ours"] == name and p["gap"] is not None and p["other"] != "none"]
        cheap, dear = ([p for p in mine if affordable(p) is yes] for yes in (True, False))
        near = [(p["other"], p["within reach"]) for p in cheap if p["within reach"] is not None]
        worst = [_worst(leads) for leads in (near, *([(p["other"], p) for p in some] for some in (cheap, dear)))]
        faithful = interval(ordinary.get(name, {}).get("faithful"))
        rows.append([name, f"{cells[name]['cost']:.2f}", seconds_ratio(cells[name]), *worst, faithful])
    plain = interval(ordinary.get("none", {}).get("faithful"))
    return Table(
        f"All of ours: least lead over published peers, {axis} below {BELOW:g}",
        [
            "ours",
            "rows / plain",
            "s / plain",
            "peers of at most plain cost, where ours has a point",
            "peers of at most plain cost",
            "dearer peers",
            "ordinary prompts faithful",
        ],
        rows,
        [f"Ordinary prompts under plain guidance: {plain}. A lead of 0 or more: on or above every such peer."],
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
        ["method", "rows / plain", "guidance scale", "similarity", "faithful and not blown up", "blown up"],
        rows,
        [f"similarity: {networks['similarity']}. faithful: {networks['faithful']}. Memorized prompts."],
    )
