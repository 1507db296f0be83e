"""The verdict on cases that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.paper.curve import compare, curves, sentences, verdict


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
    result = compare(found["ours"], found["theirs"], 0.0)
    assert result["gap"] == pytest.approx(0.7 - 0.9) and result["at"] == pytest.approx(0.5)
    assert not result["on or above"] and not result["within the interval"]  # all prompts agree: no spread
    assert compare(found["theirs"], found["ours"], 0.0)["gap"] == pytest.approx(-0.1)


def test_a_curve_that_does_not_reach_is_not_excused() -> None:
    found = curves(rows("ours", {2.0: (0.5, 0.9)}) + rows("theirs", {2.0: (0.3, 0.6), 4.0: (0.6, 0.7)}), "x", "y")
    result = compare(found["ours"], found["theirs"], 0.2)
    assert result["gap"] == pytest.approx(0.2 - (0.6 + 0.1 * 1.8 / 3), abs=1e-6)  # just left of 0.5, at tenths: 0.48
    assert result["at"] == pytest.approx(0.48)
    assert result["reached"] == pytest.approx(4 / 11)


def test_rounding_leaves_a_curve_on_itself() -> None:
    points = {1.5: (0.2, 0.4), 3.0: (0.5, 0.7), 7.5: (0.9, 0.9)}
    moved = {scale: (x + 1e-6, y) for scale, (x, y) in points.items()}
    found = curves(rows("same", points) + rows("moved", moved), "x", "y")
    result = compare(found["moved"], found["same"], 0.0)
    assert result["gap"] == pytest.approx(0, abs=1e-5) and result["on or above"] and result["reached"] == 1


@pytest.mark.parametrize("by", [3e-4, -3e-4], ids=["more similar", "less similar"])
def test_more_than_rounding_counts(by: float) -> None:
    """The curve that is to the right, more similar at equal faithfulness, is not on the other; the other is on it."""
    points = {1.5: (0.2, 0.4), 3.0: (0.5, 0.7), 7.5: (0.9, 0.9)}
    moved = {scale: (x + by, y) for scale, (x, y) in points.items()}
    found = curves(rows("same", points) + rows("moved", moved), "x", "y")
    assert compare(found["moved"], found["same"], 0.0)["on or above"] == (by < 0)


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


COST = {"none": 1.0, "a": 1.0, "b": 0.8, "expensive": 1.2, "cheap": 1.0, "dear": 3.0}


def case(b: float) -> dict[str, Any]:
    made = rows("none", {2.0: (0.9, 0.9)}) + rows("a", {2.0: (0.5, 0.4)}) + rows("b", {2.0: (0.3, b)})
    made += rows("expensive", {2.0: (0.0, 1.0)}) + rows("cheap", {2.0: (0.4, 0.5)}) + rows("dear", {2.0: (0.3, 0.8)})
    return verdict(curves(made, "x", "y"), COST, ["a", "b", "expensive"], ["none", "cheap", "dear"])


def test_verdict_holds_names_the_best_affordable_preset_and_the_dearer_peer() -> None:
    result = case(0.6)
    assert (result["best"], result["holds"]) == ("b", True)
    text = " ".join(sentences(result, "similarity"))
    won = "(b, 0.80 times) is on or above every peer's of at most that cost (cheap); its least lead is"
    assert f"{won} +0.100 [+0.100, +0.100] at similarity 0.40, over cheap." in text
    assert "below that of plain guidance itself (least lead -0.300" in text
    assert "dear at 3.00 times plain cost (-0.200" in text


def test_a_win_names_the_peer_that_comes_closest() -> None:
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 0.1, 40)
    made = []
    for i in range(40):
        for method, x, y in (("a", 0.3, 0.6), ("far", 0.5, 0.4), ("near", 0.4, 0.55 + spread[i])):
            made.append({"method": method, "scale": 2.0, "id": str(i), "x": x, "y": y})
    result = verdict(curves(made, "x", "y"), dict.fromkeys(("a", "far", "near"), 1.0), ["a"], ["far", "near"])
    cell = result["cheap"]["near"]
    assert cell["gap"] == pytest.approx(0.05 - spread.mean()) and cell["low"] < cell["gap"] < cell["high"]
    lead = f"{cell['gap']:+.3f} [{cell['low']:+.3f}, {cell['high']:+.3f}] at similarity 0.40, over near."
    assert sentences(result, "similarity")[0].endswith(f"(far, near); its least lead is {lead}")


def test_verdict_fails_when_the_numbers_do() -> None:
    result = case(0.45)
    assert (result["best"], result["holds"]) == ("b", False)
    text = " ".join(sentences(result, "similarity"))
    assert (
        "(b, 0.80 times) is NOT on or above" in text
        and "least lead is" not in text
        and "It lies below: cheap (-0.050" in text
    )


def test_no_peer_no_verdict() -> None:
    found = curves(rows("a", {2.0: (0.5, 0.4)}), "x", "y")
    assert sentences(verdict(found, COST, ["a"], []), "similarity") == [
        "Against similarity the comparison cannot be made: no peer of that cost."
    ]
