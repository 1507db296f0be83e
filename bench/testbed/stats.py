"""Small statistics: means with intervals over prompts, ratios, percentiles, AUC."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np

try:
    from scipy.stats import beta
except ImportError as error:
    raise ImportError("intervals need scipy: pip install scipy") from error

DRAWS = 2000
FEW = 10  # prompts; simulated with as few, a bootstrap of 95% covers 50% to 90% (tests/bench/testbed/test_stats.py)
TAIL = 0.025  # left out at each end of an interval of 95%


def over_prompts(rows: Sequence[dict], key: str, share: bool = True) -> dict | None:
    """Mean of `key` with a 95% interval over PROMPTS, not images; None if nothing is known.

    A bootstrap: the seeds of a prompt are not independent, so all rows of a drawn prompt enter together. Where fewer than FEW prompts
    have, or lack, what a share counts, its draws are too much alike; there the interval is `exact`, as if each prompt were one image
    (its images may be as alike as that, so it is rather too wide). `share=False` for values that are no shares, such as differences of shares.
    """
    groups = _by_prompt(rows, key)
    if not groups:
        return None
    sums, counts = _sums(groups)
    mean = float(sums.sum() / counts.sum())
    if share and _rare(groups):
        low, high = exact(mean * len(groups), len(groups))
    else:
        low, high = _percentiles(_draws(sums, counts, seed=0))
    return {"mean": mean, "low": low, "high": high, "images": int(counts.sum()), "prompts": len(groups)}


def ratio(rows: Sequence[dict], reference: Sequence[dict], key: str) -> dict[str, float | None] | None:
    """Mean of `key` in `rows` over that in `reference`, two groups of prompts, each drawn by itself; None without either or over 0.

    Where either's interval is `exact`, the bounds are those of `over_prompts`, divided: wider than they need be.
    """
    above, below = over_prompts(rows, key), over_prompts(reference, key)
    if above is None or below is None or not below["mean"]:
        return None
    sums = [_sums(_by_prompt(part, key)) for part in (rows, reference)]
    low: float
    high: float | None
    if any(_rare(_by_prompt(part, key)) for part in (rows, reference)):
        low = above["low"] / below["high"]
        high = above["high"] / below["low"] if below["low"] else None
    else:
        a, b = (_draws(*one, seed=k) for k, one in enumerate(sums))
        low, high = _percentiles(a / b)
    return {"mean": above["mean"] / below["mean"], "low": low, "high": high}


def exact(found: float, of: int) -> tuple[float, float]:
    """The 95% interval of Clopper and Pearson for a share, `found` of `of` independent units; `found` need not be whole."""
    low = float(beta.ppf(TAIL, found, of - found + 1)) if found > 0 else 0.0
    high = float(beta.ppf(1 - TAIL, found + 1, of - found)) if found < of else 1.0
    return low, high


def prompts_with(rows: Sequence[dict], key: str) -> dict:
    """The prompts of which `key` holds for any image, and the exact interval of their share."""
    groups = _by_prompt(rows, key)
    found = sum(any(values) for values in groups.values())
    low, high = exact(found, len(groups))
    return {"found": found, "of": len(groups), "mean": found / len(groups), "low": low, "high": high}


def spread(rows: Sequence[dict], key: str) -> dict | None:
    """Mean, median and 95th percentile of `key` over all images, each with its bootstrap interval over prompts; None if nothing is known."""
    groups = [np.array(values) for values in _by_prompt(rows, key).values()]
    if not groups:
        return None
    pick = np.random.default_rng(0).integers(0, len(groups), (DRAWS, len(groups)))
    drawn = [np.concatenate([groups[i] for i in one]) for one in pick]
    known = np.concatenate(groups)
    result = {}
    for name, statistic in {"mean": np.mean, "median": np.median, "p95": partial(np.percentile, q=95)}.items():
        low, high = _percentiles(np.array([statistic(one) for one in drawn]))
        result[name] = {"mean": float(statistic(known)), "low": low, "high": high}
    return result


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(a positive exceeds a negative) + half of P(they tie)."""
    p, n = np.asarray(positive)[:, None], np.asarray(negative)[None]
    return float((p > n).mean() + 0.5 * (p == n).mean())


def auc_over_prompts(positive: Sequence[dict], negative: Sequence[dict], key: str) -> dict:
    """AUC of `key` over all images with a 95% bootstrap interval; the prompts of the two groups are drawn each by itself."""
    p, n = (list(_by_prompt(rows, key).values()) for rows in (positive, negative))
    sizes = np.outer([len(a) for a in p], [len(b) for b in n]).astype(float)
    # Pairs of images of prompts i and j that the positive wins; how often a draw holds a prompt counts it.
    wins = np.array([[auc(a, b) for b in n] for a in p]) * sizes
    rng = np.random.default_rng(0)
    often = [rng.multinomial(len(side), np.full(len(side), 1 / len(side)), DRAWS) for side in (p, n)]
    won, all_pairs = (np.einsum("di,ij,dj->d", often[0], table, often[1]) for table in (wins, sizes))
    low, high = _percentiles(won / all_pairs)
    return {"mean": float(wins.sum() / sizes.sum()), "low": low, "high": high}


def _by_prompt(rows: Sequence[dict], key: str) -> dict[str, list[float]]:
    groups = defaultdict(list)
    for row in rows:
        if row[key] is not None:
            groups[row["prompt"]].append(float(row[key]))
    return groups


def _sums(groups: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([sum(v) for v in groups.values()]), np.array([len(v) for v in groups.values()])


def _rare(groups: dict[str, list[float]]) -> bool:
    """Whether fewer than FEW prompts have, or lack, what is counted; never of values that are no yes or no (a cosine)."""
    if not all(value in (0.0, 1.0) for values in groups.values() for value in values):
        return False
    return min(sum(map(any, groups.values())), sum(not all(values) for values in groups.values())) < FEW


def _draws(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    pick = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    return sums[pick].sum(1) / counts[pick].sum(1)


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [100 * TAIL, 100 * (1 - TAIL)])
    return float(low), float(high)
