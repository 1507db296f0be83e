"""How well RMS(c - u) tells memorized prompts from ordinary ones, by number of steps and seeds.

The statistic of n seeds and k steps is the mean over the seeds of the mean over the first k observed rows of RMS(c - u) =
sqrt(d / elements), under plain guidance. With S seeds a prompt there are floor(S / n) disjoint groups of n; every one is an example.
Intervals draw PROMPTS, of each class separately: the groups of a prompt are not independent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.testbed.stats import DRAWS, auc

STEPS, SEEDS = (1, 5, 50), (1, 4, 16)
FPR = 0.01


def statistic(details: Mapping[str, Any], steps: int) -> float:
    """Mean over the first `steps` rows with a d of sqrt(d / elements). ValueError if there is none."""
    known = [d for d in details["d_curve"] if d is not None][:steps]
    if not known:
        raise ValueError("d_curve: no row has both branches")
    return float(np.mean(np.sqrt(np.array(known) / details["elements"])))


def by_prompt(rows: Sequence[Mapping[str, Any]], steps: int, seeds: int) -> list[list[float]]:
    """Per prompt the statistics of its groups of `seeds` seeds."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row["id"]][row["seed"]] = statistic(row["details"], steps)
    result = []
    for values in found.values():
        ordered = [values[seed] for seed in sorted(values)]
        whole = len(ordered) // seeds
        if whole:
            result.append(np.array(ordered[: whole * seeds]).reshape(whole, seeds).mean(1).tolist())
    return result


def tpr_at(positive: Sequence[float], negative: Sequence[float], fpr: float = FPR) -> float:
    """The largest share of positives above a threshold that at most `fpr` of the negatives exceed."""
    descending = np.sort(np.asarray(negative, float))[::-1]
    allowed = int(np.floor(fpr * len(descending) + 1e-9))
    if allowed >= len(descending):
        return 1.0
    return float((np.asarray(positive, float) > descending[allowed]).mean())


def with_interval(positive: Sequence[Sequence[float]], negative: Sequence[Sequence[float]]) -> dict[str, Any]:
    """AUC and TPR at 1% FPR over all groups, with 95% bootstrap intervals over prompts."""

    def flat(some: Sequence[Sequence[float]]) -> list[float]:
        return [value for values in some for value in values]

    p, n = [list(v) for v in positive], [list(v) for v in negative]
    # wins[i, j]: of pairs of a group of positive prompt i and one of negative prompt j, those that the positive wins
    wins = np.array([[auc(a, b) * len(a) * len(b) for b in n] for a in p])
    sizes = np.outer([len(a) for a in p], [len(b) for b in n]).astype(float)
    rng = np.random.default_rng(0)
    aucs, rates = [], []
    for _ in range(DRAWS):
        i, j = rng.integers(0, len(p), len(p)), rng.integers(0, len(n), len(n))
        aucs.append(wins[np.ix_(i, j)].sum() / sizes[np.ix_(i, j)].sum())
        rates.append(tpr_at(flat([p[k] for k in i]), flat([n[k] for k in j])))

    def cell(value: float, draws: list[float]) -> dict[str, float]:
        low, high = np.percentile(draws, [2.5, 97.5])
        return {"mean": value, "low": float(low), "high": float(high)}

    return {
        "auc": cell(auc(flat(positive), flat(negative)), aucs),
        "tpr": cell(tpr_at(flat(positive), flat(negative)), rates),
        "memorized": len(p),
        "ordinary": len(n),
    }


def table(rows: Sequence[Mapping[str, Any]], total_steps: int) -> list[dict[str, Any]]:
    """A cell for every number of steps and seeds for which there are enough; empty without ordinary prompts."""
    memorized = [row for row in rows if row["group"] == "memorized"]
    ordinary = [row for row in rows if row["group"] == "ordinary"]
    found = []
    for steps in sorted({min(k, total_steps) for k in STEPS}):
        for seeds in SEEDS:
            positive, negative = by_prompt(memorized, steps, seeds), by_prompt(ordinary, steps, seeds)
            if positive and negative:
                found.append({"steps": steps, "seeds": seeds, **with_interval(positive, negative)})
    return found
