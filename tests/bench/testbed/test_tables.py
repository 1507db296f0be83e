"""The columns of docs/testbed, counted from made-up images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bench.testbed import anchored_test, evaluate, stats, tables
from fastguard import policy, testbed
from fastguard.testbed import prompts

TAU = policy(testbed.policy_path()).gate


def image(prompt: str, rms: float, copy: bool | None = None) -> dict:
    return {"prompt": prompt, "d_curve": [512 * rms**2, 0.0], "copy": copy}


def test_a_prompt_is_memorized_from_80_percent_of_its_seeds_on():
    some = prompts("memorized", "test")
    copies = {p.prompt: 5 - i % 3 for i, p in enumerate(some)}  # of five seeds: 100%, 80%, 60%
    rows = [{"prompt": p.prompt, "copy": seed < copies[p.prompt]} for p in some for seed in range(5)]
    found = evaluate.qualifying(rows)
    for kind in "DT":
        names = [p.prompt for p in some if p.kind == kind]
        assert found[kind] == {"prompts": len(names), "memorized": sum(copies[n] >= 4 for n in names)}
    assert sum(found[kind]["memorized"] for kind in "DT") == 20


def test_the_gate_catches_what_reaches_it():
    below, above = 0.9 * TAU, 1.1 * TAU
    memorized = [image("a", r, c) for r, c in ((above, True), (above, True), (below, True), (below, False))]
    memorized += [
        image("b", r, c) for r, c in ((above, True), (above, True), (below, True), (above, True), (TAU * 3, False))
    ]
    ordinary = [image("c", below), image("c", below), image("d", above)]
    near = [image("e", below, True), image("f", above, False), image("f", above, True)]
    found = evaluate.gate(memorized, ordinary, near)
    assert found["threshold"] == TAU
    assert (found["memorized images caught"], found["memorized images missed"]) == (6, 3)
    assert (found["copies"], found["copies missed"]) == (7, 2)
    assert (found["ordinary images touched"], found["ordinary images"]) == (1, 3)
    assert found["near captions"] == {"images": 3, "caught": 2}
    assert found["memorized, qualifying"] == 1  # b, with 4 of 5; a has 3 of 4


def test_images_that_the_gate_leaves_alone_are_compared_bit_by_bit():
    plain = [{"prompt": str(i // 2), "hash": i} for i in range(6)]
    caught = [True, True, False, False, False, False]
    guarded = [p | {"gate": {"caught": c}} for p, c in zip(plain, caught, strict=True)]
    guarded[0]["hash"] = guarded[4]["hash"] = guarded[5]["hash"] = 99
    found = evaluate.touched(plain, guarded)
    assert found["share caught"]["mean"] == pytest.approx(2 / 6)
    assert (found["images"], found["caught"]) == (6, 2)
    assert (found["released and bit-identical"], found["released but different"]) == (2, 2)


def test_flips_of_the_gate_between_dtypes_are_counted(monkeypatch):
    exact = [image(str(i // 2), (0.9 + 0.2 * (i % 2)) * TAU) for i in range(6)]
    low = [*exact[:4], image("2", 1.1 * TAU), image("2", 0.9 * TAU)]
    monkeypatch.setattr(evaluate, "load", lambda **_: None)
    monkeypatch.setattr(evaluate, "first_rows", lambda *_: low)
    found = evaluate.dtypes(exact)
    assert set(found) == {"float16", "bfloat16"}
    assert found["float16"]["images"] == 6 and found["float16"]["gate flips"]["mean"] == pytest.approx(2 / 6)


def test_a_gated_row_is_the_guarded_image_where_the_gate_catches():
    plain = [image("a", rms, True) for rms in (0.9 * TAU, TAU, 2 * TAU)]
    guarded = [image("b", 9.0, False) for _ in plain]
    assert anchored_test.behind(plain, guarded) == [plain[0], *guarded[1:]]
    assert anchored_test.caught(plain)["mean"] == pytest.approx(2 / 3)


def test_useful_is_no_copy_faithful_and_not_blown_up():
    kinds = [(c, f, b) for c in (False, True) for f in (False, True) for b in (False, True)]
    rows = [
        {"prompt": str(i), "copy": c, "faithful": f, "blown": b, "similarity": 0.5} for i, (c, f, b) in enumerate(kinds)
    ]
    found = anchored_test.describe(rows)
    assert found["useful"]["mean"] == 1 / 8 and found["copy"]["mean"] == 1 / 2
    assert found["faithful, no copies"]["images"] == 4 and found["similarity"]["p95"]["mean"] == 0.5


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_are_of_95_percent(seeds):
    """160 of 400 prompts, the seeds of each alike: the bootstrap's law is Binomial(400, 0.4) / 400, however many the seeds."""
    rows = [{"prompt": str(i), "x": i % 5 < 2} for i in range(400) for _ in range(seeds)]
    found = stats.over_prompts(rows, "x")
    low, high = scipy_stats.binom.ppf([0.025, 0.975], 400, 0.4) / 400  # 0.3525, 0.4475; at 80% 0.37 and 0.43
    assert found["mean"] == pytest.approx(0.4)
    assert found["low"] == pytest.approx(low, abs=0.006) and found["high"] == pytest.approx(high, abs=0.006)


def test_the_paper_s_numbers():
    """The 95th percentiles of SSCD that the paper prints: S1 none .6504, STP .2857, OG+STP .3811; S3 none .7977, DTP .5885, OG+DTP .6915."""
    assert tables.PAPER == {
        "stp": ("S1", 0.6504, 0.2857),
        "og+stp": ("S1", 0.6504, 0.3811),
        "dtp": ("S3", 0.7977, 0.5885),
        "og+dtp": ("S3", 0.7977, 0.6915),
    }
    results = json.loads((Path(__file__).resolve().parents[3] / "docs" / "testbed" / "results.json").read_text())
    rows = tables.main_rows(results["main"], "D")
    shown = {row[0]: row[list(tables.MAIN_HEAD).index("the paper's")] for row in rows}
    assert {name: text for name, text in shown.items() if text} == {
        "stp": "-56% (S1)",
        "og+stp": "-41% (S1)",
        "dtp": "-26% (S3)",
        "og+dtp": "-13% (S3)",
    }


def test_percentiles():
    rows = [{"prompt": str(i // 4), "x": None if i == 101 else i} for i in range(102)]
    found = stats.spread(rows, "x")
    assert {name: one["mean"] for name, one in found.items()} == {"mean": 50.0, "median": 50.0, "p95": 95.0}
    assert stats.spread([{"prompt": "a", "x": None}], "x") is None
    assert np.isclose(evaluate.rms({"d_curve": [512 * 0.25]}), 0.5)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_percentiles_are_of_95_percent(seeds):
    """Of 401 different values, the seeds of a prompt alike, the bootstrap's median is an order statistic: rank ~ Binomial(401, 1/2)."""
    rows = [{"prompt": str(i), "x": i / 401} for i in range(401) for _ in range(seeds)]
    found = stats.spread(rows, "x")
    for name, level in (("median", 0.5), ("p95", 0.95)):
        low, high = scipy_stats.binom.ppf([0.025, 0.975], 401, level) / 401
        assert found[name]["low"] == pytest.approx(low, abs=0.008) and found[name]["high"] == pytest.approx(
            high, abs=0.008
        )
    half = 1.96 * np.std([row["x"] for row in rows]) / 401**0.5  # the mean's is the normal one
    assert found["mean"]["high"] - found["mean"]["mean"] == pytest.approx(half, rel=0.08)
