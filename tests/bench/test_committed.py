"""The committed pages: every number from the rows beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.recheck.__main__ import main

PAPER = Path(__file__).parents[2] / "docs" / "paper"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["duplicated", "lora"])
def test_every_number_of_a_committed_page_is_in_its_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PAPER / name) == 0
    assert int(capsys.readouterr().out.split()[0]) > 400, "cells worked out again"
