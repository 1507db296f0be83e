"""A replayed rule is scored on the image of the rule that it is named by."""

from __future__ import annotations

import numpy as np
import pytest

from bench.testbed import grid, rules
from bench.testbed.run import run
from fastguard import policy
from fastguard.testbed import prompts
from fastguard.testbed.sampling import Sample

FLAT = {"prompt": "a", "seed": 0, "d_curve": [1.0] * 50}


@pytest.fixture(scope="module")
def timesteps(pipe):
    return grid.timesteps(pipe)


@pytest.fixture(scope="module")
def candidates(pipe):
    return rules.candidates(grid.timesteps(pipe), grid.noise(pipe))


def test_fixed_timesteps_and_deadlines_are_scored_on_the_row_at_which_they_fire(candidates, timesteps):
    images = {("a", 0): [{"row": k} for k in range(0, 50, 3)] + [{"row": None}]}
    seen = 0
    for rule in candidates:
        fixed = rule["parameters"].get("t_star", rule["parameters"].get("deadline"))
        if fixed is None:
            continue
        (scored,) = rules.outcome(rule, [FLAT], images)
        fires = next(k for k, t in enumerate(timesteps) if t <= fixed)
        assert scored["row"] == fires and timesteps[fires] == fixed, rule
        seen += 1
    assert seen == len(rules.STATIC) + 5 * len(rules.DEADLINES)


def test_a_rule_that_looks_at_the_curve_is_at_most_one_row_off():
    images = {("a", 0): [{"row": k} for k in range(0, 50, 3)] + [{"row": None}]}
    for fired in range(50):
        rule = {"fire": lambda d, k=fired: k}
        (scored,) = rules.outcome(rule, [FLAT], images)
        assert abs(scored["row"] - fired) <= 1
    assert rules.outcome({"fire": lambda d: None}, [FLAT], images)[0]["row"] is None


def test_a_timestep_between_two_rows_of_the_grid_is_refused(timesteps, monkeypatch):
    monkeypatch.setattr(rules, "STATIC", (861, 841))
    with pytest.raises(ValueError, match=r"\[841\]: must be of the grid"):
        rules.candidates(timesteps, np.ones(50))


def test_a_replayed_image_is_the_real_one(pipe, judge, timesteps, tmp_path, monkeypatch):
    """To the bit, on a grid of five rows. The real policies share their batch with the grid's ends: sums depend on what is computed together."""
    monkeypatch.setattr(rules, "EVERY", 12)
    monkeypatch.setattr(rules, "STATIC", (741, 501, 261))
    monkeypatch.setattr(rules, "DEADLINES", (501,))
    (prompt,) = some = prompts("D", "tuning")[:1]
    never, images = grid.transitions(pipe, judge, "few", some, 1, tmp_path)
    static = [c for c in rules.candidates(timesteps, grid.noise(pipe)) if c["family"] == "static"]
    replayed = [rules.outcome(rule, never, images)[0] for rule in static]
    ends = [policy("stp", t_star=t) for t in (981, 21)]
    policies = [ends[0], *map(rules.as_policy, static), ends[1]]
    real = run(pipe, judge, "real", [Sample(prompt, 0, one) for one in policies], tmp_path)[1:-1]
    assert [r["transition_timestep"] for r in replayed] == [741, 501, 261]
    assert [r["hash"] for r in replayed] == [r["hash"] for r in real]
    assert len({r["hash"] for r in real}) == 3
