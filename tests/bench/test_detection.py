"""AUC and TPR against definitions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from bench.paper.detection import by_prompt, statistic, table, tpr_at, with_interval


def row(group: str, name: str, seed: int, curve: list[float | None]) -> dict[str, Any]:
    return {"group": group, "id": name, "seed": seed, "details": {"d_curve": curve, "elements": 4}}


def test_statistic_is_the_mean_rms_of_the_first_observed_rows() -> None:
    details = {"d_curve": [16.0, None, 4.0, 64.0], "elements": 4}
    assert statistic(details, 1) == 2.0
    assert statistic(details, 2) == (2.0 + 1.0) / 2
    assert statistic(details, 50) == (2.0 + 1.0 + 4.0) / 3
    with pytest.raises(ValueError, match="d_curve"):
        statistic({"d_curve": [None], "elements": 4}, 1)


def test_groups_are_disjoint_seeds_in_order() -> None:
    rows = [row("memorized", "a", seed, [4.0 * (seed + 1) ** 2]) for seed in (4, 0, 1, 2, 3)]
    assert by_prompt(rows, 1, 1) == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert by_prompt(rows, 1, 2) == [[1.5, 3.5]]
    assert by_prompt(rows, 1, 16) == []


@pytest.mark.parametrize("seed", range(5))
def test_tpr_is_the_best_threshold_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    negative = np.round(rng.normal(size=150), 1).tolist()  # with ties
    positive = np.round(rng.normal(1.5, 1, size=40), 1).tolist()
    best = 0.0
    for threshold in [-math.inf, *negative, *positive]:
        if sum(v > threshold for v in negative) / 150 <= 0.01:
            best = max(best, sum(v > threshold for v in positive) / 40)
    assert tpr_at(positive, negative) == best


def test_auc_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    positive = [(rng.normal(1, 1) + rng.normal(0, 0.1, 3)).tolist() for _ in range(30)]
    negative = [(rng.normal(0, 1) + rng.normal(0, 0.1, 2)).tolist() for _ in range(40)]
    found = with_interval(positive, negative)
    p, n = [v for x in positive for v in x], [v for x in negative for v in x]
    assert found["auc"]["mean"] == pytest.approx(sum(a > b for a in p for b in n) / len(p) / len(n))
    assert found["auc"]["low"] < found["auc"]["mean"] < found["auc"]["high"]
    # Hanley and McNeil (1982) for as many independent examples as there are prompts.
    a = found["auc"]["mean"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + 29 * (q1 - a * a) + 39 * (q2 - a * a)) / (30 * 40))
    assert (found["auc"]["high"] - found["auc"]["low"]) / (2 * 1.96) == pytest.approx(error, rel=0.25)


def test_table_has_the_cells_for_which_there_are_seeds() -> None:
    rows = [row("memorized", n, s, [16.0] * 8) for n in "ab" for s in range(4)]
    rows += [row("ordinary", n, s, [1.0] * 8) for n in "cd" for s in range(4)]
    cells = table(rows, 8)
    assert [(c["steps"], c["seeds"]) for c in cells] == [(1, 1), (1, 4), (5, 1), (5, 4), (8, 1), (8, 4)]
    assert all(c["auc"]["mean"] == 1 and c["tpr"]["mean"] == 1 for c in cells)
    assert table([r for r in rows if r["group"] == "memorized"], 8) == []
