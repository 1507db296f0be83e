"""The replayed rules against hand-made curves and against the library's own decisions."""

import numpy as np
import pytest

from fastguard import policy
from fastguard.testbed import grid, prompts, rules, stats
from fastguard.testbed.run import generate, jobs


def test_minimum_fires_one_row_after_the_first_strict_minimum():
    assert rules.minimum(np.array([5.0, 4.0, 3.0, 4.0, 1.0, 2.0])) == 3
    assert rules.minimum(np.array([5.0, 4.0, 4.0, 5.0])) is None
    assert rules.minimum(np.array([5.0, 4.0, 4.5, 2.0, 3.0]), min_drop=0.5) == 4
    assert rules.minimum(np.array([3.0, 1.0, 2.0, 1.0, 2.0]), min_step=2) == 4


def test_drop_compares_with_the_maximum_so_far():
    assert rules.drop(np.array([1.0, 4.0, 2.0, 1.1]), 0.3) == 3
    assert rules.drop(np.array([4.0, 3.0, 2.0]), 0.3) is None


def test_deadline_takes_the_earlier_row():
    t = [900, 700, 500, 300]
    assert rules.with_deadline(None, t, 500) == 2
    assert rules.with_deadline(1, t, 500) == 1
    assert rules.with_deadline(3, t, None) == 3


@pytest.mark.parametrize(
    ("fields", "replay"),
    [
        ({}, lambda d, noise: rules.minimum(d)),
        ({"min_drop": 0.3}, lambda d, noise: rules.minimum(d, 0, 0.3)),
        (
            {"rule": "drop", "magnitude": "x0", "rho": 0.5},
            lambda d, noise: rules.drop(d * noise, 0.5),
        ),
        ({"rule": "drop", "rho": 0.5}, lambda d, noise: rules.drop(d, 0.5)),
    ],
)
def test_replayed_decisions_are_the_library_s(pipe, fields, replay):
    some = prompts("D", "tuning")[:4]
    _, never = generate(pipe, jobs(some, 1, policy("stp", t_star=0, monitor=True)))
    _, real = generate(pipe, jobs(some, 1, policy("paper-dtp", **fields)))
    curves = [np.array(r["d_curve"], float) for r in never]
    expect = [replay(d, grid.noise(pipe)) for d in curves]
    assert [r["transition_step"] for r in real] == expect


def test_auc_counts_pairs():
    assert stats.auc([2, 3], [1, 2]) == pytest.approx(3.5 / 4)


def test_interval_over_prompts_holds_the_mean_and_ignores_what_is_unknown():
    rows = [{"prompt": str(i // 4), "x": i % 4 == 0} for i in range(80)] + [{"prompt": "y", "x": None}]
    result = stats.over_prompts(rows, "x")
    assert result["mean"] == result["low"] == result["high"] == 0.25
    assert (result["images"], result["prompts"]) == (80, 20)


def test_the_best_rules_and_how_far_they_lie_apart(pipe):
    """Made-up images: useful if the transition comes at rows 12 to 18, for prompt 'b' at 15 to 21. Counted by hand from the rows."""
    t, drops = grid.timesteps(pipe), {"a": 14, "b": 17, "c": 30}
    never = [
        {"prompt": p, "seed": 0, "d_curve": [100.0 if k < drop else 1.0 for k in range(50)], "copy": False, "faithful": False, "blown": False}
        for p, drop in drops.items()
    ]  # fmt: skip
    good = {"a": range(12, 19), "b": range(15, 22), "c": range(15, 22)}
    table = {
        (p, 0): [
            {"prompt": p, "copy": k < good[p].start, "faithful": k in good[p], "blown": False}
            for k in range(0, 50, rules.EVERY)
        ]
        + [one]
        for one in never
        for p in [one["prompt"]]
    }
    ranked = grid.front(pipe, never, table)
    found = grid.contest(pipe, never, table, ranked)
    best = {family: one["useful"]["mean"] for family, one in found["best"].items()}
    for family, value in best.items():
        assert value == max(r["useful"] for r in ranked if r["family"] == family)
    # A fixed row of 15 or 18 suits all three; a drop comes where the curve falls: rows 14 and 17, and 30, which is too late for c.
    assert best["static"] == 1.0
    assert best["drop in output"] == pytest.approx(2 / 3)
    apart = {(d["more"], d["less"]): d["useful"] for d in found["differences"]}
    assert apart["static", "drop in output"]["mean"] == pytest.approx(1 / 3)
    assert apart["static", "drop in output"]["low"] == 0.0 and apart["static", "drop in output"]["prompts"] == 3
    assert t[15] > t[18]
