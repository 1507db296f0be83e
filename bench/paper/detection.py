"""How well what is known after a few rows tells memorized prompts from ordinary ones, by statistic and number of noises.

A statistic is one number an image under plain guidance; that of n noises is its mean over n of them. With S noises a prompt there are
floor(S / n) disjoint groups of n; every one is an example. Intervals draw PROMPTS, of each class separately: the groups of a prompt are
not independent. A larger value always speaks for memorized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.paper.work import PLAIN_CURVES, WATCHED
from bench.testbed.stats import DRAWS, auc

SEEDS = (1, 4, 16)
RATES = (0.01, 0.001)
GAMMAS = (
    1.0,
    2.0,
)  # of norm and cosine, as Asthana and Belagiannis fix them for Stable Diffusion 1.4; (1, 0.1) for 2, (2, 1) for others


@dataclass(frozen=True)
class Statistic:
    """A detector: the number it makes of an image's details, the rows that have been evaluated by then, those beyond plain guidance, its source."""

    value: Callable[[Mapping[str, Any]], float]
    rows: int | None  # None: all of them
    extra: int
    source: str
    method: str = WATCHED


def guidance(details: Mapping[str, Any], rows: int | None = None) -> float:
    """Mean over the first `rows` rows with a d of RMS(c - u) = sqrt(d / elements). ValueError if there is none."""
    known = [d for d in details["d_curve"] if d is not None][:rows]
    if not known:
        raise ValueError("d_curve: no row has both branches")
    return float(np.mean(np.sqrt(np.array(known) / details["elements"])))


def anisotropy(details: Mapping[str, Any]) -> float:
    """gamma_1 ||c - u|| at the first row + gamma_2 cos(u, c - u) at a low-noise one."""
    return GAMMAS[0] * details["norm"] + GAMMAS[1] * details["cosine"]


WEN, CHANGE = "Wen et al., ICLR 2024", "github.com/randomnameforicml/icml-2026"
BROKEN, ASTHANA = "after Broken Memories, KDD 2026: no public code", "Asthana and Belagiannis, ICLR 2026"
STATISTICS = {
    "RMS(c - u), first row: the gate": Statistic(lambda d: guidance(d, 1), 2, 0, WEN),
    "RMS(c - u), 5 rows": Statistic(lambda d: guidance(d, 5), 10, 0, WEN),
    "RMS(c - u), all rows": Statistic(guidance, None, 0, WEN, PLAIN_CURVES),
    "change of c, rows 0 to 1": Statistic(lambda d: d["change"][0], 4, 0, CHANGE),
    "change of c, rows 1 to 2": Statistic(lambda d: d["change"][1], 6, 0, CHANGE),
    "update of the latents, first row": Statistic(lambda d: d["update"][0], 2, 0, BROKEN),
    "update of the latents, 5 rows": Statistic(lambda d: float(np.mean(d["update"])), 10, 0, BROKEN),
    "anisotropy: norm + 2 cosine": Statistic(anisotropy, 4, 2, ASTHANA),
    "anisotropy's cosine alone": Statistic(lambda d: d["cosine"], 4, 2, ASTHANA),
}


def by_prompt(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], seeds: int
) -> list[list[float]]:
    """Per prompt the means of `value` of its groups of `seeds` seeds; rows in which it cannot be had are left out."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        try:
            found[row["id"]][row["seed"]] = value(row["details"])
        except (KeyError, IndexError, ValueError):
            continue
    result = []
    for values in found.values():
        ordered = [values[seed] for seed in sorted(values)]
        whole = len(ordered) // seeds
        if whole:
            result.append(np.array(ordered[: whole * seeds]).reshape(whole, seeds).mean(1).tolist())
    return result


def tpr_at(positive: Sequence[float], negative: Sequence[float], fpr: float) -> float:
    """The largest share of positives above a threshold that at most `fpr` of the negatives exceed."""
    descending = np.sort(np.asarray(negative, float))[::-1]
    allowed = int(np.floor(fpr * len(descending) + 1e-9))
    if allowed >= len(descending):
        return 1.0
    return float((np.asarray(positive, float) > descending[allowed]).mean())


def with_interval(positive: Sequence[Sequence[float]], negative: Sequence[Sequence[float]]) -> dict[str, Any]:
    """AUC and TPR at each of RATES over all groups, with 95% bootstrap intervals over prompts."""

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
        drawn = flat([p[k] for k in i]), flat([n[k] for k in j])
        rates.append([tpr_at(*drawn, rate) for rate in RATES])

    def cell(value: float, draws: Sequence[float]) -> dict[str, float]:
        low, high = np.percentile(draws, [2.5, 97.5])
        return {"mean": value, "low": float(low), "high": float(high)}

    return {
        "auc": cell(auc(flat(positive), flat(negative)), aucs),
        "tpr": {
            f"{rate:g}": cell(tpr_at(flat(positive), flat(negative), rate), [one[k] for one in rates])
            for k, rate in enumerate(RATES)
        },
        "memorized": len(p),
        "ordinary": len(n),
        "ordinary groups": len(flat(n)),
    }


def table(rows: Sequence[Mapping[str, Any]], steps: int) -> list[dict[str, Any]]:
    """A cell for every statistic and number of seeds for which there are enough; empty without ordinary prompts."""
    found = []
    for name, one in STATISTICS.items():
        mine = [row for row in rows if row["method"] == one.method]
        for seeds in SEEDS:
            positive, negative = (
                by_prompt([row for row in mine if row["group"] == group], one.value, seeds)
                for group in ("memorized", "ordinary")
            )
            if positive and negative:
                asked = {"rows": one.rows or 2 * steps, "extra": one.extra, "source": one.source}
                found.append({"statistic": name, "seeds": seeds, **asked, **with_interval(positive, negative)})
    return found
