"""Small statistics: means with intervals over prompts, percentiles, AUC."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

DRAWS = 2000


def over_prompts(rows: Sequence[dict], key: str) -> dict | None:
    """Mean of `key` with a 95% bootstrap interval that draws PROMPTS, not images; None if nothing is known.

    The seeds of a prompt are not independent, so all rows of a drawn prompt enter together.
    """
    groups = defaultdict(list)
    for row in rows:
        if row[key] is not None:
            groups[row["prompt"]].append(float(row[key]))
    if not groups:
        return None
    sums = np.array([sum(v) for v in groups.values()])
    counts = np.array([len(v) for v in groups.values()])
    pick = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "mean": float(sums.sum() / counts.sum()),
        "low": float(low),
        "high": float(high),
        "images": int(counts.sum()),
        "prompts": len(groups),
    }


def spread(values: Sequence[float | None]) -> dict | None:
    """Mean, median and 95th percentile."""
    known = np.array([v for v in values if v is not None], float)
    if not len(known):
        return None
    return {
        "mean": float(known.mean()),
        "median": float(np.median(known)),
        "p95": float(np.percentile(known, 95)),
    }


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(a positive exceeds a negative) + half of P(they tie)."""
    p, n = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float((p > n).mean() + 0.5 * (p == n).mean())
