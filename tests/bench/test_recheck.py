"""The recheck finds a wrong number wherever it stands: the committed page of the LoRA with one number changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.recheck.__main__ import main
from bench.recheck.rows import Page
from bench.recheck.words import published, sentences

LORA = Path(__file__).parents[2] / "docs" / "paper" / "lora"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (r"^(- policy \(1\.0)0", r"\g<1>1"),  # its cost
        (r"(similarity below 0\.5: of )3", r"\g<1>4"),  # how many peers
        (r"(it lies below \S+ \(\S+ times, -0\.)0", r"\g<1>1"),  # by how much
        (r"(\[-0\.\d+, \+0\.)\d", r"\g<1>9"),  # an interval
        (r"(at similarity 0\.)\d", r"\g<1>9"),  # where
        (r"(it lies below )random-numbers", r"\1random-words"),  # whom
        (r"(its least lead is [+-]0\.)\d", r"\g<1>9"),  # within reach
        (r"(least lead \+0\.0)\d", r"\g<1>9"),  # where it is above
        (r"(under plain guidance: 0\.)5", r"\g<1>6"),
        (r"^- 20( memorized prompts)", r"- 21\1"),
    ],
)
def test_a_wrong_number_in_a_sentence(page: Page, there: str, instead: str) -> None:
    text = (LORA / "tables.md").read_text()
    changed, count = re.subn(there, instead, text, count=1, flags=re.M)
    assert count == 1 and changed != text
    found = [one for one in sentences(page, changed) if one[1] != one[2]]
    assert found, "not seen"


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(LORA)


def test_ours_beside_the_published_numbers(page: Page) -> None:
    assert published(page, "none 0.5; og+stp 0.100 (-1%)").startswith("none 0.5; og+stp 0.9")
    assert published(page, "-") == "-"


def test_no_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="settings"):
        main(tmp_path)
