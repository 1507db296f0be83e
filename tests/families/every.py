"""All tiny instances, by name, and which of them run in the fast tier."""

from __future__ import annotations

import pytest

from tests.families.more import MORE
from tests.families.older import OLDER
from tests.families.recent import RECENT
from tests.families.tiny import CASES
from tests.families.videos import VIDEOS

_GROUPS = (CASES, MORE, OLDER, VIDEOS, RECENT)
EVERY = {name: tiny for group in _GROUPS for name, tiny in group.items()}
assert len(EVERY) == sum(map(len, _GROUPS)), "two instances have one name, and one of them would not run"
_FAST = (*CASES, "kontext", "qwen edit", "qwen edit plus", "wan i2v", "ltx i2v", "hidream")
PARAMS = [name if name in _FAST else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
