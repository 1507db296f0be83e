"""Tiny instances of the older image pipelines."""

from __future__ import annotations

from tests.families.tiny import Tiny

OLDER: dict[str, Tiny] = {}
