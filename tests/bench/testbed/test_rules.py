"""The replayed rules against hand-made curves and against the library's own decisions."""

import numpy as np
import pytest

from bench.testbed import grid, rules, stats
from bench.testbed.run import jobs
from fastguard import policy, testbed
from fastguard.testbed import prompts
from fastguard.testbed.sampling import generate


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


def test_the_best_rules_are_run_and_compared(pipe, monkeypatch, tmp_path):
    """Made-up images: useful if the transition comes at rows 12 to 18, for prompts 'b' and 'c' at 15 to 21. Counted by hand from the rows."""
    drops = {"a": 14, "b": 17, "c": 30}
    good = {"a": range(12, 19), "b": range(15, 22), "c": range(15, 22)}
    curves = {p: [100.0 if k < drop else 1.0 for k in range(50)] for p, drop in drops.items()}

    def image(p, k):
        return {"prompt": p, "copy": k < good[p].start, "faithful": k in good[p], "blown": False, "transition_step": k}

    never = [{"seed": 0, "d_curve": curves[p], **image(p, 99)} for p in drops]
    table = {(p, 0): [image(p, k) for k in range(0, 50, rules.EVERY)] + [image(p, 99)] for p in drops}
    ranked = grid.front(pipe, never, table)
    ran = []

    def real(pipe, judge, name, work, cache):
        ran.append((name, work))
        chosen, rows = work[0].policy, []
        for job in work:
            if chosen.transition == "static":
                k = rules.with_deadline(None, grid.timesteps(pipe), chosen.t_star)
            else:
                d = np.array(curves[job.prompt.prompt]) * (grid.noise(pipe) if chosen.magnitude == "x0" else 1)
                k = rules.minimum(d) if chosen.rule == "minimum" else rules.drop(d, chosen.rho)
                k = 99 if (k := rules.with_deadline(k, grid.timesteps(pipe), chosen.deadline)) is None else k
            rows.append(image(job.prompt.prompt, k))
        return rows

    monkeypatch.setattr(grid, "run", real)
    some = [testbed.Prompt(p, p, "D", "test", 40, 0) for p in drops]
    found = grid.contest(pipe, None, some, 1, tmp_path, ranked)
    assert len({name for name, _ in ran}) == 4 and all(len(work) == 3 for _, work in ran)
    # A fixed row of 15 or 18 suits all three; a drop comes where the curve falls: rows 14 and 17, and 30, which is too late for c.
    best = {family: one["useful"]["mean"] for family, one in found["best"].items()}
    assert best["static"] == 1.0 and found["best"]["static"]["parameters"] == {"t_star": 681}
    assert best["drop in output"] == pytest.approx(2 / 3)
    assert found["best"]["drop in output"]["median row"] == 17
    apart = {(d["more"], d["less"]): d["useful"] for d in found["differences"]}
    assert apart["static", "drop in output"]["mean"] == pytest.approx(1 / 3)
    assert apart["static", "drop in output"]["low"] == 0.0 and apart["static", "drop in output"]["prompts"] == 3
