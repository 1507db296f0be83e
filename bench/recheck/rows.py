"""The rows, what is said of shares of them, and a page's settings."""

from __future__ import annotations

import gzip
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

DRAWS = 2000
Rows = list[dict[str, Any]]
SPREADS = {
    "own p95 / mean / above 0.5": "similarity",
    "whole set p95 / mean / above 0.5": "similarity_set",
    "SSCD own p95 / mean / above 0.5": "sscd",
    "SSCD whole set p95 / mean / above 0.5": "sscd_set",
}
SHARES = {
    "copies": "copy",
    "faithful": "faithful",
    "faithful, first five": "faithful5",
    "CLIP score": "clip",
    "blown up": "blown",
}
UNCHECKED = "?"


def read(folder: Path) -> Rows:
    """The rows, whichever of the two files is there."""
    plain, packed = folder / "results.jsonl", folder / "results.jsonl.gz"
    text = plain.read_text() if plain.exists() else gzip.decompress(packed.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def by_prompt(rows: Rows, name: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get(name) is not None:
            groups[row["prompt"]].append(float(row[name]))
    return dict(groups)


def share(rows: Rows, name: str) -> tuple[float, float, float] | None:
    """Mean and 95% interval: bootstrap over prompts, exact (Clopper and Pearson on prompts) where fewer than ten have or lack it."""
    groups = list(by_prompt(rows, name).values())
    if not groups:
        return None
    sums, counts = np.array([sum(g) for g in groups]), np.array([len(g) for g in groups])
    mean, n = sums.sum() / counts.sum(), len(groups)
    yes_or_no = {v for g in groups for v in g} <= {0.0, 1.0}
    if yes_or_no and min(sum(max(g) > 0 for g in groups), sum(min(g) < 1 for g in groups)) < 10:
        k = mean * n
        low = beta.ppf(0.025, k, n - k + 1) if k > 0 else 0.0
        high = beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
        return mean, low, high
    drawn = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    means = [sums[d].sum() / counts[d].sum() for d in drawn]
    return mean, *np.percentile(means, [2.5, 97.5])


def digits(value: float | np.floating[Any], form: str = ".2f") -> str:
    """A value that is a tie, .0005 in three digits, but for the order of its sums, is that tie."""
    return f"{round(float(value), 9):{form}}"


def shown(cell: tuple[float, float, float] | None, form: str = ".2f") -> str:
    return "-" if cell is None else f"{digits(cell[0], form)} [{digits(cell[1], form)}, {digits(cell[2], form)}]"


def spread(values: list[float]) -> str:
    above = float(np.mean(np.array(values) > 0.5))
    return f"{digits(np.percentile(values, 95), '.3f')} / {digits(np.mean(values), '.3f')} / {digits(above, '.0%')}"


class Page:
    """What is known of a run, and the tables worked out from it."""

    def __init__(self, folder: Path) -> None:
        self.settings = json.loads((folder / "settings.json").read_text())
        self.scale, self.seeds = self.settings["guidance_scale"], self.settings["seeds"]
        self.ordinary_seeds, self.noises = self.settings["ordinary_seeds"], self.settings["detection_seeds"]
        path = folder / "seconds.json"
        self.seconds = json.loads(path.read_text()) if path.exists() else {}
        self.rows = read(folder)

    def of(self, method: str, group: str, scale: float | None = None) -> Rows:
        seeds = self.seeds if group == "memorized" else self.ordinary_seeds
        scale = self.scale if scale is None else scale
        keep = (method, group, scale)
        return [r for r in self.rows if (r["method"], r["group"], r["scale"]) == keep and r["seed"] < seeds]

    def cost(self, method: str, group: str = "memorized") -> float:
        mine, plain = ([r["rows"] for r in self.of(m, group)] for m in (method, "none"))
        return float(np.mean(mine) / np.mean(plain))

    def ratio(self, method: str) -> str:
        known = self.seconds.get(method)
        if not known:
            return "-"
        low, middle, high = statistics.quantiles(known, n=4) if len(known) > 1 else known * 3
        return shown((middle, low, high))

    def method(self, method: str, group: str, head: list[str]) -> list[str]:
        rows = self.of(method, group)
        line = []
        for title in head:
            name = title.split(" (")[0]
            if name == "method":
                line.append(method)
            elif name == "images":
                line.append(str(len(rows)))
            elif name == "rows / plain":
                line.append(digits(self.cost(method, group)))
            elif name == "s / plain":
                line.append(self.ratio(method))
            elif name == "backward passes":
                steps = [r["details"]["updates"] for r in rows if "updates" in r["details"]]
                line.append(digits(np.mean(steps)) if steps else "-")
            elif name == "caught by the gate":
                gates = [r["details"]["gate"]["caught"] for r in rows if r["details"].get("gate")]
                line.append(digits(np.mean(gates), ".0%") if gates else "-")
            elif name == "faithful, of what is no copy":
                free = [r for r in rows if r["copy"] is False]
                count = sum(len(g) for g in by_prompt(free, "faithful").values())
                line.append(shown(share(free, "faithful")) + f" n={count}" if free else "-")
            elif name in SPREADS:
                values = [r[SPREADS[name]] for r in rows if r.get(SPREADS[name]) is not None]
                line.append(spread(values) if values else "-")
            elif name in SHARES:
                line.append(shown(share(rows, SHARES[name])))
            else:
                line.append(UNCHECKED)
        return line
