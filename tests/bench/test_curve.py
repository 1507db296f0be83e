"""The verdict on cases that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.paper.curve import compare, curves, sentence, verdict


def rows(method: str, points: dict[float, tuple[float, float]], prompts: int = 8) -> list[dict[str, Any]]:
    return [
        {"method": method, "scale": s, "id": str(i), "seed": k, "x": x, "y": y}
        for s, (x, y) in points.items()
        for i in range(prompts)
        for k in range(2)
    ]


def test_offers_interpolates_between_scales_and_never_gets_worse_to_the_right() -> None:
    found = curves(rows("a", {2.0: (0.2, 0.1), 4.0: (0.4, 0.5), 8.0: (0.8, 0.3)}), "x", "y")["a"]

    def at(x: float) -> float:
        return float(found.offers(np.full(len(found.x), x), -1.0)[0])

    assert at(0.1) == -1.0  # nothing there: the floor
    assert at(0.2) == pytest.approx(0.1)
    assert at(0.3) == pytest.approx(0.3)  # half way from (0.2, 0.1) to (0.4, 0.5)
    assert at(0.4) == pytest.approx(0.5)
    assert at(0.6) == pytest.approx(0.5)  # the polyline has 0.4 there, but 0.5 at less similarity
    assert at(9.0) == pytest.approx(0.5)


def test_gap_is_the_least_along_the_whole_polyline() -> None:
    # Theirs peaks in a segment of ours that is lower: ours is on or above at theirs' ends, below in the middle.
    both = rows("ours", {1.5: (0.0, 0.5), 3.0: (1.0, 0.9)}) + rows(
        "theirs", {1.5: (0.0, 0.4), 3.0: (0.5, 0.9), 9.0: (1.0, 0.9)}
    )
    found = curves(both, "x", "y")
    result = compare(found["ours"], found["theirs"], 0.0, below=9)
    assert result["gap"] == pytest.approx(0.7 - 0.9) and result["at"] == pytest.approx(0.5)
    assert not result["on or above"] and not result["within the interval"]  # all prompts agree: no spread
    assert compare(found["theirs"], found["ours"], 0.0, below=9)["gap"] == pytest.approx(-0.1)


def test_a_curve_that_does_not_reach_is_not_excused() -> None:
    found = curves(rows("ours", {2.0: (0.5, 0.9)}) + rows("theirs", {2.0: (0.3, 0.6), 4.0: (0.6, 0.7)}), "x", "y")
    result = compare(found["ours"], found["theirs"], 0.2, below=9)
    assert result["gap"] == pytest.approx(0.2 - (0.6 + 0.1 * 1.8 / 3), abs=1e-6)  # just left of 0.5, at tenths: 0.48
    assert result["at"] == pytest.approx(0.48)
    assert result["reached"] == pytest.approx(4 / 11)
    assert result["within reach"] == {"gap": pytest.approx(0.9 - 0.7), "at": pytest.approx(0.6)}
    assert compare(found["ours"], found["theirs"], 0.2, below=0.45)["within reach"] is None


def test_rounding_leaves_a_curve_on_itself() -> None:
    points = {1.5: (0.2, 0.4), 3.0: (0.5, 0.7), 7.5: (0.9, 0.9)}
    moved = {scale: (x + 1e-6, y) for scale, (x, y) in points.items()}
    found = curves(rows("same", points) + rows("moved", moved), "x", "y")
    result = compare(found["moved"], found["same"], 0.0, below=9)
    assert result["gap"] == pytest.approx(0, abs=1e-5) and result["on or above"] and result["reached"] == 1


@pytest.mark.parametrize("by", [3e-4, -3e-4], ids=["more similar", "less similar"])
def test_more_than_rounding_counts(by: float) -> None:
    """The curve that is to the right, more similar at equal faithfulness, is not on the other; the other is on it."""
    points = {1.5: (0.2, 0.4), 3.0: (0.5, 0.7), 7.5: (0.9, 0.9)}
    moved = {scale: (x + by, y) for scale, (x, y) in points.items()}
    found = curves(rows("same", points) + rows("moved", moved), "x", "y")
    assert compare(found["moved"], found["same"], 0.0, below=9)["on or above"] == (by < 0)


def test_interval_is_that_of_the_paired_difference() -> None:
    # Both vary much between prompts, but together: only the difference counts.
    rng = np.random.default_rng(0)
    base, noise = rng.normal(0, 1, 40), rng.normal(0, 0.1, 40)
    made = []
    for i in range(40):
        made.append({"method": "ours", "scale": 2.0, "id": str(i), "x": 0.0, "y": base[i] + noise[i]})
        made.append({"method": "theirs", "scale": 2.0, "id": str(i), "x": 0.0, "y": base[i]})
    found = curves(made, "x", "y")
    result = compare(found["ours"], found["theirs"], -9.0)
    assert result["gap"] == pytest.approx(noise.mean())
    half = 1.96 * noise.std() / np.sqrt(40)
    assert result["high"] - result["low"] == pytest.approx(2 * half, rel=0.15)


def test_only_where_images_are_no_copies() -> None:
    """Theirs is ahead from 0.5 on only; a peer that never gets below is nothing to compare with."""
    both = rows("ours", {1.5: (0.1, 0.5), 3.0: (0.9, 0.6)}) + rows("theirs", {1.5: (0.2, 0.4), 9.0: (0.6, 1.0)})
    found = curves([*both, *rows("copies", {2.0: (0.7, 1.0)})], "x", "y")
    assert compare(found["ours"], found["theirs"], 0.0, below=9)["gap"] == pytest.approx(0.5625 - 1.0)
    result = compare(found["ours"], found["theirs"], 0.0)
    # tenths of theirs: the last below 0.5 is 0.48, where theirs has 0.82 and ours 0.5 + 0.1 * 0.38 / 0.8
    assert result["at"] == pytest.approx(0.48) and result["gap"] == pytest.approx(0.5 + 0.1 * 0.38 / 0.8 - 0.82)
    assert compare(found["ours"], found["copies"], 0.0) is None


COST = {"a": 1.0, "b": 0.8, "cheap": 1.0, "low": 1.0, "dear": 3.0, "copies": 1.0}


def case(b: float, *others: str) -> list[dict[str, Any]]:
    made = rows("a", {2.0: (0.3, 0.1)}) + rows("b", {2.0: (0.3, b)}) + rows("cheap", {2.0: (0.4, 0.5)})
    made += rows("low", {2.0: (0.45, 0.2)}) + rows("dear", {2.0: (0.3, 0.8)}) + rows("copies", {2.0: (0.9, 1.0)})
    return verdict(curves(made, "x", "y"), COST, ["a", "b"], others)


def test_every_pair_stands_there_once() -> None:
    pairs = case(0.6, "cheap", "copies", "unknown")
    assert [(p["ours"], p["other"], p["gap"]) for p in pairs] == [
        ("a", "cheap", pytest.approx(-0.4)),
        ("a", "copies", None),
        ("b", "cheap", pytest.approx(0.1)),
        ("b", "copies", None),
    ]


@pytest.mark.parametrize(
    ("b", "others", "said"),
    [
        (
            0.6,
            ["cheap", "low", "copies"],
            "on or above all 2 peers of at most plain cost that get there; least lead +0.100 [+0.100, +0.100] at similarity 0.40, over cheap.",
        ),
        (
            0.45,
            ["low", "cheap"],
            "of 2 peers of at most plain cost that get there it lies below cheap (1.00 times, -0.050 [-0.050, -0.050] at similarity 0.40).",
        ),
        (
            0.6,
            ["cheap", "dear"],
            "over cheap; and below the dearer dear (3.00 times, -0.200 [-0.200, -0.200] at similarity 0.30).",
        ),
        (0.9, ["cheap", "dear"], "over cheap; below none of the 1 dearer ones."),
        (0.9, ["dear"], "no peer of at most plain cost gets there; below none of the 1 dearer ones."),
        (0.9, ["copies"], "no peer's curve gets there."),
    ],
)
def test_sentences(b: float, others: list[str], said: str) -> None:
    text = sentence([pair for pair in case(b, *others) if pair["ours"] == "b"], "similarity")
    assert text.startswith("b (0.80 times plain cost), similarity below 0.5: ") and text.endswith(said), text
