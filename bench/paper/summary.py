"""All numbers of the page from the rows of results.jsonl: JSON values, no text but names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.metrics import summary as spread
from bench.paper import curve, detection
from bench.paper.work import PLAIN, PLAIN_CURVES, WATCHED, Amount
from bench.testbed.stats import over_prompts

SIMILARITIES = ("similarity", "similarity_set", "sscd", "sscd_set")
AXES = {"similarity": "similarity", "copy rate": "copy"}
SHIPPED = ("policy", "embedded-policy", "policy-ungated", "embedded-policy-ungated", "anchored", "anchored-gated")
SHARES = ("copy", "faithful", "faithful5", "clip", "blown")


def steady(value: Any) -> Any:
    """Nine digits after the point of every number in JSON values. Sums in another order differ beyond them, and a mean of .0005 would print up or down."""
    if isinstance(value, Mapping):
        return {key: steady(one) for key, one in value.items()}
    if isinstance(value, list):
        return [steady(one) for one in value]
    return round(value, 9) if isinstance(value, float) else value


def describe(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of one method on one group of prompts: cost, similarities, shares with intervals over prompts."""
    have = set(rows[0])
    free = [row for row in rows if row.get("copy") is False]
    found: dict[str, Any] = {
        "images": len(rows),
        "rows": float(np.mean([row["rows"] for row in rows])),
        "seconds": float(np.mean([row["seconds"] for row in rows])),
        "not finite": sum(not row["finite"] for row in rows),
        **{name: spread([row[name] for row in rows]) for name in SIMILARITIES if name in have},
        **{name: over_prompts(rows, name) for name in SHARES if name in have},
    }
    if "faithful" in have and "copy" in have:
        found["faithful, no copy"] = over_prompts(free, "faithful") if free else None
    updates = [row["details"]["updates"] for row in rows if "updates" in row["details"]]
    if updates:
        found["backward"] = float(np.mean(updates))
    gates = [row["details"]["gate"]["caught"] for row in rows if row["details"].get("gate")]
    if gates:
        found["caught"] = float(np.mean(gates))
    return found


def first_prediction(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How similar x0(c) of the first row is to the training images, by kind of prompt: the spread, and whether it counts as a copy."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        name = "similarity" if mine[0].get("similarity") is not None else "similarity_set"
        if mine[0].get(name) is not None:
            values = np.array([row[name] for row in mine], float)
            copies = over_prompts(mine, "copy") if "copy" in mine[0] else None
            low, middle, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
            found[kind] = {"of": name, "median": middle, "quartiles": [low, high], "copy": copies, "images": len(mine)}
    return found


def against_reference(rows: Sequence[dict[str, Any]], scale: float) -> dict[str, Any] | None:
    """Rows of og+dtp over those of the authors' opposite script mended, on the memorized images that both made; None without them.

    A row holds its batch's mean; the script's own rows of an image are 2 (steps of its probe + steps of its second pass).
    """
    ours, theirs = (
        {(r["id"], r["seed"]): r for r in rows if (r["method"], r["group"], r["scale"]) == (name, "memorized", scale)}
        for name in ("og+dtp", "reference-og+dtp")
    )
    both = [
        (ours[key]["rows"], 2 * (len(row["details"]["probe_curve"]) + len(row["details"]["timesteps"])))
        for key, row in theirs.items()
        if key in ours
    ]
    if not both:
        return None
    a, b = np.array(both, float).T
    return {"ratio": float(a.sum() / b.sum()), "a quarter at most": int((4 * a <= b).sum()), "images": len(both)}


def _points(method: str, one: curve.Curve, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curve's points, each with the share of its images that are blown up, where that is measured."""
    points = one.points()
    for point in points:
        blown = [r["blown"] for r in rows if (r["method"], r["scale"]) == (method, point["scale"]) and "blown" in r]
        if blown:
            point["blown"] = float(np.mean(blown))
    return points


def summarise(
    rows: Sequence[dict[str, Any]], methods: Mapping[str, Mapping[str, Any]], amount: Amount, steps: int
) -> dict[str, Any]:
    """Tables, detection, curves and verdicts of everything that was made. `methods`: name -> {"ours": bool, "peer": bool, ...}.

    In curves and verdicts an image that is blown up is not faithful, whatever the network says that it shows.
    """
    looked = [
        row
        for row in rows
        if row["method"] in (WATCHED, PLAIN_CURVES) and row["scale"] == amount.scale and row["seed"] < amount.detection
    ]
    rows = [row for row in rows if row["method"] in methods and row["method"] != WATCHED]

    def part(method: str, group: str, scale: float) -> list[dict[str, Any]]:
        seeds = amount.seeds if group == "memorized" else amount.ordinary
        return [
            row
            for row in rows
            if (row["method"], row["group"], row["scale"]) == (method, group, scale) and row["seed"] < seeds
        ]

    tables: dict[str, dict[str, Any]] = {}
    for group in ("memorized", "ordinary"):
        cells = {name: part(name, group, amount.scale) for name in methods}
        tables[group] = {name: describe(some) for name, some in cells.items() if some}
    plain = tables["memorized"][PLAIN]["rows"]
    cost = {name: cell["rows"] / plain for name, cell in tables["memorized"].items()}
    for of_group in tables.values():
        base = of_group.get(PLAIN)
        for cell in of_group.values():
            cell["cost"] = cell["rows"] / base["rows"] if base else None
    ours = [name for name in cost if methods[name]["ours"]]
    peers = [name for name in cost if methods[name]["peer"]]
    shown = [row for row in rows if row["group"] == "memorized" and row["seed"] < amount.seeds]
    result: dict[str, Any] = {"tables": tables, "cost": cost, "detection": [], "curves": {}, "verdicts": {}}
    result["sentences"] = []
    result["against reference"] = against_reference(shown, amount.scale)
    if amount.detection:
        result["detection"] = detection.table(looked, steps)
        result["first prediction"] = first_prediction([row for row in looked if row["method"] == WATCHED])
    strict = [row | {"faithful": 0.0} if row.get("blown") else row for row in shown]
    shipped = [name for name in SHIPPED if name in ours] or ours
    for axis, column in AXES.items():
        found = {name: one for name, one in curve.curves(strict, column, "faithful").items() if name in cost}
        result["curves"][axis] = {name: _points(name, one, shown) for name, one in found.items()}
        result["verdicts"][axis] = pairs = steady(curve.verdict(found, cost, ours, [*peers, PLAIN]))
        for name in shipped:
            if mine := [pair for pair in pairs if pair["ours"] == name and pair["other"] != PLAIN]:
                result["sentences"].append(curve.sentence(mine, axis))
    return dict(steady(result))
