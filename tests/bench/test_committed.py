"""The committed pages: every number from the rows beside it, and those of the overview from the pages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench.recheck.__main__ import main, tables

PAPER = Path(__file__).parents[2] / "docs" / "paper"
NAMES = ("duplicated", "lora", "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_a_committed_page_is_in_its_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PAPER / name) == 0
    assert int(capsys.readouterr().out.split()[0]) > 1600, "cells worked out again"


def by_method(name: str, group: str) -> dict[str, dict[str, str]]:
    """The cells of a page's first tables, by method and by what stands above them, letters of the networks left out."""
    found = tables((PAPER / name / "tables.md").read_text())
    head, *lines = next(table for title, table in found.items() if title.startswith(group))
    names = [re.sub(r" \(.\)$", "", title) for title in head]
    return {line[0]: dict(zip(names, line, strict=True)) for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_the_seconds_of_every_method_were_taken_by_turns(name: str) -> None:
    found = json.loads((PAPER / name / "seconds.json").read_text())
    assert set(found) == set(by_method(name, "Memorized")) and {len(ratios) for ratios in found.values()} == {5}


def test_the_overviews_numbers_are_those_of_the_pages() -> None:
    parts = (PAPER / "README.md").read_text().split("\n## ")
    sections = {m[1]: part for part in parts if (m := re.search(r"\((\w+)/tables\.md\)", part.splitlines()[0]))}
    assert set(sections) == set(NAMES)
    for name, text in sections.items():
        memorized, ordinary = by_method(name, "Memorized"), by_method(name, "Ordinary")
        every = tables((PAPER / name / "tables.md").read_text())["Every point of the curves"]
        points = {(line[0], line[2]): line[-1] for line in every}
        (head, *lines) = next(iter(tables("## x\n" + re.sub(r"(?m)^\|---", "| ---", text)).values()))
        shown = 0
        for line in lines:
            said = dict(zip(head, line, strict=False))
            method = re.sub(r"[`*]|, no gate", "", said.get("method", ""))
            if method.startswith("the shipped policy"):
                method = "embedded-policy" if name == "duplicated" else "policy"
            page = memorized.get("none" if method == "plain guidance" else method)
            if page is None or len(line) < len(head):
                continue  # another table
            other, shown = ordinary[page["method"]], shown + 1
            assert all(said[column] == page[column] for column in ("rows / plain", "s / plain", "copies", "faithful"))
            p95, mean, _ = page["own p95 / mean / above 0.5"].split(" / ")
            digits = [float(one) for one in said["similarity, mean / p95"].split(" / ")]
            assert digits == pytest.approx([float(mean), float(p95)], abs=0.00501), "one digit less than the page"
            assert said["ordinary prompts faithful"] == other["faithful"], (name, method)
            assert said["blown up"] == points[page["method"], "3"], (name, method)
            caught = [one["caught by the gate"] for one in (page, other)]
            assert said["caught: memorized / ordinary"] == ("-" if caught[0] == "-" else " / ".join(caught))
        assert shown == len(memorized) - 1, "all but cfg, whose images are plain guidance's"
