"""What FINDINGS.md quotes is computed from the measured rows, and the page from results.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.testbed import facts, tables

DOCS = Path(__file__).parents[3] / "docs" / "testbed"


def test_the_committed_page_is_made_from_the_committed_numbers():
    assert tables.page(json.loads((DOCS / "results.json").read_text())) == (DOCS / "README.md").read_text()


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


def test_what_the_gate_catches():
    def image(prompt, caught, copy, forced):
        return {"prompt": prompt, "gate": {"caught": caught}, "copy": copy, "forced": forced}

    found = facts.behind_the_gate(
        [image("a", True, True, True), image("a", True, False, None), image("b", False, True, None)]
    )
    means = [found[k]["mean"] for k in ("caught", "copies of the caught", "the deadline decides")]
    assert means == pytest.approx([2 / 3, 1 / 2, 1 / 2])


def test_medians_are_over_images_and_scaled_by_the_noise():
    curves = [
        {"d_curve": [1.0, 4.0], "timesteps": [981.0, 961.0]},
        {"d_curve": [3.0, 8.0], "timesteps": [981.0, 961.0]},
    ]
    found = facts.medians(curves, np.array([10.0, 0.5]))
    assert found == {"t": [981.0, 961.0], "d": [2.0, 6.0], "d in x0 space": [20.0, 3.0]}
