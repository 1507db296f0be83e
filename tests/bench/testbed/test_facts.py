"""Numbers of the curves are computed from the measured rows, and the page from the committed numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.testbed import facts, tables

DOCS = Path(__file__).parents[3] / "docs" / "testbed"


def test_the_committed_page_is_made_from_the_committed_numbers():
    numbers = [json.loads((DOCS / f"{name}.json").read_text()) for name in ("results", "anchored-test", "rules")]
    assert tables.page(*numbers) == (DOCS / "README.md").read_text()


def test_depth_of_a_minimum_is_against_its_lower_neighbour():
    def fired(step, t, curve):
        return {"transition_step": step, "transition_timestep": t, "d_curve": curve}

    found = facts.minima(
        [
            fired(3, 741.0, [9.0, 10.0, 9.95, 20.0]),  # 0.5% below 10
            fired(2, 661.0, [20.0, 9.0, 10.0]),  # 10% below 10
            fired(None, None, [3.0, 2.0, 1.0]),
        ]
    )
    assert found["fired"] == pytest.approx(2 / 3) and found["less than 1% deep"] == 0.5
    assert found["t, quartiles"] == [721.0, 701.0, 681.0]
