"""Intervals over prompts against scipy and against draws written out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from bench.testbed import stats


def rows(share, prompts=25, seeds=4, start=0):
    """Prompt i has round(share(i) * seeds) rows that are true."""
    return [{"prompt": start + i, "x": s < round(share(i) * seeds)} for i in range(prompts) for s in range(seeds)]


@pytest.mark.parametrize(("found", "of"), [(0, 28), (28, 28), (2, 100), (1, 1), (3, 1100), (700, 1100)])
def test_exact_is_clopper_and_pearson(found, of):
    expect = binomtest(found, of).proportion_ci(0.95, "exact")
    assert stats.exact(found, of) == pytest.approx((expect.low, expect.high), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_none_or_all_has_an_interval(value):
    found = stats.over_prompts(rows(lambda i: value, prompts=28), "x")
    expect = binomtest(28 * int(value), 28).proportion_ci(0.95, "exact")
    assert (found["low"], found["high"]) == pytest.approx((expect.low, expect.high), abs=1e-9)
    assert found["mean"] == value and found["high"] - found["low"] > 0.12


@pytest.mark.parametrize("lacking", [False, True])
def test_few_prompts_count_as_one_image_each(lacking):
    """3 images of 400, of 3 prompts: 0.75 of 100 units. No fewer events make it narrower: with none there are 3.6%."""
    found = stats.over_prompts([r | {"x": r["x"] != lacking} for r in rows(lambda i: 0.25 * (i < 3), prompts=100)], "x")
    low, high = beta.ppf(0.025, 0.75, 100.25), beta.ppf(0.975, 1.75, 99.25)
    expect = (1 - high, 1 - low) if lacking else (low, high)
    assert (found["low"], found["high"]) == pytest.approx(expect, abs=1e-9)
    assert high > stats.over_prompts(rows(lambda i: 0.0, prompts=100), "x")["high"] > 0.036


@pytest.mark.parametrize(
    ("prompts", "seeds", "share", "alike"), [(100, 11, 0.0073, 0.25), (28, 4, 0.03, 0.3), (28, 4, 0.42, 0.3)]
)
def test_intervals_cover_what_they_say(prompts, seeds, share, alike):
    """Prompts whose shares follow a beta law of that intraclass correlation. A bootstrap alone covers the first two in 79% and 75%."""
    rng = np.random.default_rng(11)
    a, b = ((1 - alike) / alike * part for part in (share, 1 - share))
    inside = 0
    for _ in range(200):
        counts = rng.binomial(seeds, rng.beta(a, b, prompts))
        one = [{"prompt": i, "x": s < c} for i, c in enumerate(counts) for s in range(seeds)]
        found = stats.over_prompts(one, "x")
        inside += found["low"] <= share <= found["high"]
    assert inside >= 200 * 0.95 - 2 * (200 * 0.95 * 0.05) ** 0.5  # two standard deviations of a coverage of 95%


def test_what_is_no_yes_or_no_has_no_binomial_interval():
    """CLIP's cosine stands where the embedded model has a share."""
    found = stats.over_prompts([{"prompt": i, "x": 0.3 + 0.001 * i} for i in range(6)], "x")
    assert 0.3 <= found["low"] < found["mean"] < found["high"] <= 0.305


def test_a_difference_of_nothing_is_no_share():
    found = stats.over_prompts(rows(lambda i: 0.0), "x", share=False)
    assert found["low"] == found["mean"] == found["high"] == 0.0


def test_prompts_with_any():
    found = stats.prompts_with(rows(lambda i: i < 2, prompts=100, seeds=1), "x")
    several = stats.prompts_with(rows(lambda i: 0.5 * (i < 2), prompts=100), "x")
    assert found == several and (found["found"], found["of"]) == (2, 100)
    assert (found["low"], found["high"]) == pytest.approx((0.00243, 0.0704), abs=1e-4)


def test_both_groups_of_a_ratio_are_drawn():
    above, below = rows(lambda i: i % 4 / 4), rows(lambda i: i % 5 / 4, prompts=60, start=100)
    found = stats.ratio(above, below, "x")
    rng, table = (
        np.random.default_rng(7),
        [np.array([r["x"] for r in part]).reshape(-1, 4).mean(1) for part in (above, below)],
    )
    a, b = (part[rng.integers(0, len(part), (20_000, len(part)))].mean(1) for part in table)
    assert found["mean"] == pytest.approx(table[0].mean() / table[1].mean())
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(a / b, [2.5, 97.5]), abs=0.02)
    alone = np.percentile(a / table[1].mean(), [2.5, 97.5])
    assert found["high"] - found["low"] > 1.05 * (alone[1] - alone[0]), "the reference varies too"


def test_a_ratio_of_none_or_all_has_an_interval_and_of_nothing_none():
    below = rows(lambda i: 0.75, start=100)
    zero, one = (stats.ratio(rows(lambda i, v=v: v), below, "x") for v in (0.0, 1.0))
    assert zero["low"] == zero["mean"] == 0 and zero["high"] > 0.13
    assert one["mean"] == pytest.approx(4 / 3) and one["low"] < 1.2 and one["high"] >= 4 / 3
    assert stats.ratio([], below, "x") is None and stats.ratio(below, rows(lambda i: 0.0), "x") is None


def test_auc_draws_prompts_of_both_groups():
    rng = np.random.default_rng(3)
    groups = [
        [{"prompt": i, "x": centre + own + 0.1 * rng.normal()} for i, own in enumerate(rng.normal(size=n)) for _ in range(4)]
        for centre, n in ((2.0, 30), (0.0, 50))
    ]  # fmt: skip
    found = stats.auc_over_prompts(*groups, "x")
    values = [np.array([r["x"] for r in part]).reshape(-1, 4) for part in groups]
    assert found["mean"] == pytest.approx((values[0].reshape(-1, 1) > values[1].reshape(1, -1)).mean())
    draws = []
    for _ in range(1000):
        p, n = (v[rng.integers(0, len(v), len(v))].ravel() for v in values)
        draws.append((p[:, None] > n).mean())
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)
