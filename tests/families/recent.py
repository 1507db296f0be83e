"""Tiny instances of recent image pipelines."""

from __future__ import annotations

from tests.families.recent_variants import VARIANTS
from tests.families.tiny import Tiny

RECENT: dict[str, Tiny] = {**VARIANTS}
