"""docs/schedulers.md says what the compiler does today, and its numbers are as small as promised."""

from __future__ import annotations

import re
from pathlib import Path

from bench import schedulers_page

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"


def without_measurements(text: str) -> str:
    """Roundings depend on the machine at hand."""
    return re.sub(r"\d(\.\d)?e[-+]\d\d", "#", text)


def test_page_is_current():
    text = schedulers_page.markdown()
    assert without_measurements(PAGE.read_text()) == without_measurements(text), (
        "run: python -m bench.schedulers_page > docs/schedulers.md"
    )


def test_every_documented_scheduler_keeps_the_promise():
    schedules = dict(schedulers_page.schedules())
    assert sum(s.linear for s in schedules.values()) == 30
    assert all(s.residual < 1e-13 and s.rounding < 3e-7 for s in schedules.values() if s.linear)
