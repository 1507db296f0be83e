"""AUC and TPR against definitions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from bench.paper.detection import STATISTICS, by_prompt, guidance, table, tpr_at, with_interval


def row(group: str, name: str, seed: int, curve: list[float | None]) -> dict[str, Any]:
    return {"group": group, "id": name, "seed": seed, "details": {"d_curve": curve, "elements": 4}}


def test_statistic_is_the_mean_rms_of_the_first_observed_rows() -> None:
    details = {"d_curve": [16.0, None, 4.0, 64.0], "elements": 4}
    assert guidance(details, 1) == 2.0
    assert guidance(details, 2) == (2.0 + 1.0) / 2
    assert guidance(details) == (2.0 + 1.0 + 4.0) / 3
    with pytest.raises(ValueError, match="d_curve"):
        guidance({"d_curve": [None], "elements": 4}, 1)


def test_groups_are_disjoint_seeds_in_order() -> None:
    rows = [row("memorized", "a", seed, [4.0 * (seed + 1) ** 2]) for seed in (4, 0, 1, 2, 3)]
    assert by_prompt(rows, guidance, 1) == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert by_prompt(rows, guidance, 2) == [[1.5, 3.5]]
    assert by_prompt(rows, guidance, 16) == []


@pytest.mark.parametrize("fpr", [0.01, 0.001])
@pytest.mark.parametrize("seed", range(5))
def test_tpr_is_the_best_threshold_of_all(seed: int, fpr: float) -> None:
    rng = np.random.default_rng(seed)
    negative = np.round(rng.normal(size=150), 1).tolist()  # with ties
    positive = np.round(rng.normal(1.5, 1, size=40), 1).tolist()
    best = 0.0
    for threshold in [-math.inf, *negative, *positive]:
        if sum(v > threshold for v in negative) / 150 <= fpr:
            best = max(best, sum(v > threshold for v in positive) / 40)
    assert tpr_at(positive, negative, fpr) == best


def test_auc_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    positive = [(rng.normal(1, 1) + rng.normal(0, 0.1, 3)).tolist() for _ in range(30)]
    negative = [(rng.normal(0, 1) + rng.normal(0, 0.1, 2)).tolist() for _ in range(40)]
    found = with_interval(positive, negative)
    p, n = [v for x in positive for v in x], [v for x in negative for v in x]
    assert found["auc"]["mean"] == pytest.approx(sum(a > b for a in p for b in n) / len(p) / len(n))
    assert found["tpr"]["0.01"]["mean"] == tpr_at(p, n, 0.01) and found["tpr"]["0.001"]["mean"] == tpr_at(p, n, 0.001)
    assert found["auc"]["low"] < found["auc"]["mean"] < found["auc"]["high"]
    # Hanley and McNeil (1982) for as many independent examples as there are prompts.
    a = found["auc"]["mean"]
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + 29 * (q1 - a * a) + 39 * (q2 - a * a)) / (30 * 40))
    assert (found["auc"]["high"] - found["auc"]["low"]) / (2 * 1.96) == pytest.approx(error, rel=0.25)


def look(group: str, name: str, seed: int, size: float) -> dict[str, Any]:
    """A first look whose statistics are all `size` but for the cosine, which is 2 for ordinary prompts."""
    cosine = 2.0 if group == "ordinary" else 0.5
    details = {"d_curve": [4 * size**2] * 5, "elements": 4, "change": [size] * 4, "update": [size] * 5}
    details |= {"norm": size, "cosine": cosine}
    return {"method": "first-look", "group": group, "id": name, "seed": seed, "details": details}


def test_table_has_every_statistic_for_which_there_are_seeds() -> None:
    rows = [look("memorized", n, s, 2.0) for n in "ab" for s in range(4)]
    rows += [look("ordinary", n, s, 1.0) for n in "cd" for s in range(4)]
    rows += [r | {"method": "cfg"} for r in rows if r["seed"] == 0]
    cells = table(rows, 50)
    found = {(c["statistic"], c["seeds"]): c for c in cells}
    plain = "RMS(c - u), all rows"
    assert set(found) == {(name, n) for name in STATISTICS for n in ((1,) if name == plain else (1, 4))}
    for (name, seeds), cell in found.items():
        # norm + 2 cosine: 2 + 1 against 1 + 4; the cosine alone 0.5 against 2
        want = 0 if name.startswith("anisotropy") else 1
        assert cell["auc"]["mean"] == want and cell["tpr"]["0.01"]["mean"] == cell["tpr"]["0.001"]["mean"] == want
        assert cell["ordinary groups"] == (2 if name == plain else 8 // seeds)
    assert (found[plain, 1]["rows"], found["anisotropy: norm + 2 cosine", 1]["extra"]) == (100, 2)
    assert table([r for r in rows if r["group"] == "memorized"], 50) == []
