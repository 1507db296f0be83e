"""Tiny instances of recent image pipelines."""

from __future__ import annotations

from tests.families.recent_bria import BRIA
from tests.families.recent_single import SINGLE
from tests.families.recent_variants import VARIANTS
from tests.families.tiny import Tiny

RECENT: dict[str, Tiny] = {**VARIANTS, **BRIA, **SINGLE}
