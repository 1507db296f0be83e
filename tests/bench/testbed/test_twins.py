"""Near twins among the drawings, and what the committed files say of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.testbed.twins import TWIN, nearest
from fastguard.testbed import classifier, prompts

DOCS = Path(__file__).parents[3] / "docs" / "testbed"


def drawing(red: int, alpha: int = 255) -> np.ndarray:
    return np.full((8, 8, 4), (red, 0, 0, alpha), np.uint8)


def test_the_nearest_of_the_same_concept_on_grey():
    rgba = np.stack([drawing(100), drawing(106), drawing(200), drawing(101), drawing(9, alpha=0)])
    concept = np.array([0, 0, 0, 1, 1])
    found = nearest(rgba, concept)
    ghost = np.sqrt(np.mean((np.array([101, 0, 0]) - 127.5) ** 2))  # what is transparent is grey
    assert found == pytest.approx([np.sqrt(36 / 3), np.sqrt(36 / 3), np.sqrt(94**2 / 3), ghost, ghost], rel=1e-5)
    among = np.array([True, False, False, True, True])
    found = nearest(rgba, concept, among)
    assert found[0] == np.inf and found[1] == pytest.approx(np.sqrt(36 / 3), rel=1e-5)


def test_what_the_pages_say_of_twins():
    measured = json.loads((DOCS / "baselines.json").read_text())
    results = json.loads((DOCS / "results.json").read_text())
    twins = measured["twins"]["memorized"]
    assert measured["thresholds"]["TWIN"] == TWIN and all(d < TWIN for d in twins.values())
    test = {p.prompt for p in prompts("D", "test")}
    assert set(results["D without twins"]["with a twin"]) == test & set(twins)
    assert results["D without twins"]["no guard"]["images"] == 4 * len(test - set(twins))
    known = json.loads(classifier.WEIGHTS.with_suffix(".json").read_text())
    assert known["held-out drawings without a twin"]["top-1"] < known["held-out drawings"]["top-1"]
