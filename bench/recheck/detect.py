"""The tables of detectors and of first predictions, once more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.recheck.rows import DRAWS, Page, share, shown


def root(details: dict[str, Any], rows: int | None) -> float:
    known = [d for d in details["d_curve"] if d is not None][:rows]
    return sum((d / details["elements"]) ** 0.5 for d in known) / len(known)


# value, method, rows evaluated by then ("": all)
DETECTORS: dict[str, tuple[Callable[[dict[str, Any]], float], str, str]] = {
    "RMS(c - u), first row: the gate": (lambda d: root(d, 1), "first-look", "2"),
    "RMS(c - u), 5 rows": (lambda d: root(d, 5), "first-look", "10"),
    "RMS(c - u), all rows": (lambda d: root(d, None), "cfg", ""),
    "change of c, rows 0 to 1": (lambda d: d["change"][0], "first-look", "4"),
    "change of c, rows 1 to 2": (lambda d: d["change"][1], "first-look", "6"),
    "update of the latents, first row": (lambda d: d["update"][0], "first-look", "2"),
    "update of the latents, 5 rows": (lambda d: sum(d["update"]) / len(d["update"]), "first-look", "10"),
    "anisotropy: norm + 2 cosine": (lambda d: d["norm"] + 2 * d["cosine"], "first-look", "4 + 2"),
    "anisotropy's cosine alone": (lambda d: d["cosine"], "first-look", "4 + 2"),
}


def detection(page: Page, name: str, noises: int) -> list[str] | None:
    """A line of the table of detectors."""
    value, method, rows = DETECTORS[name]
    sides = []
    for group in ("memorized", "ordinary"):
        values: dict[str, dict[int, float]] = defaultdict(dict)
        for r in page.rows:
            if (r["method"], r["group"], r["scale"]) == (method, group, page.scale) and r["seed"] < page.noises:
                values[r["id"]][r["seed"]] = value(r["details"])
        sides.append(
            [
                [float(np.mean(v[k : k + noises])) for k in range(0, len(v) // noises * noises, noises)]
                for v in ([one[s] for s in sorted(one)] for one in values.values())
                if len(v) >= noises
            ]
        )
    p, n = sides
    if not p or not n:
        return None

    def auc(a: list[list[float]], b: list[list[float]]) -> float:
        x, z = np.concatenate(a)[:, None], np.concatenate(b)[None]
        return float(((x > z) + 0.5 * (x == z)).mean())

    def tpr(a: list[list[float]], b: list[list[float]], rate: float) -> float:
        x, z = np.concatenate(a), np.sort(np.concatenate(b))[::-1]
        return float((x > z[int(rate * len(z) + 1e-9)]).mean())

    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        i, j = rng.integers(0, len(p), len(p)), rng.integers(0, len(n), len(n))
        a, b = [p[k] for k in i], [n[k] for k in j]
        drawn.append((auc(a, b), tpr(a, b, 0.01), tpr(a, b, 0.001)))
    point = (auc(p, n), tpr(p, n, 0.01), tpr(p, n, 0.001))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    cells = [shown((point[k], low[k], high[k]), ".3f" if k == 0 else ".2f") for k in range(3)]
    return [name, str(noises), rows or str(2 * page.settings["steps"]), *cells, f"{len(p)} / {len(n)}"]


def first(page: Page, kind: str) -> list[str]:
    """A line of the table of first predictions."""
    rows = [r for r in page.rows if r["method"] == "first-look" and r["kind"] == kind and r["seed"] < page.noises]
    own = rows[0].get("similarity") is not None
    low, middle, high = np.percentile([r["similarity" if own else "similarity_set"] for r in rows], [25, 50, 75])
    copies = shown(share(rows, "copy"))
    return [kind, str(len(rows)), "own" if own else "whole set", shown((middle, low, high)), copies]
