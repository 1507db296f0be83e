"""Tiny instances of the older image pipelines."""

from __future__ import annotations

from tests.families.older_deepfloyd import DEEPFLOYD
from tests.families.older_kandinsky import KANDINSKY
from tests.families.older_relatives import RELATIVES
from tests.families.older_transformers import TRANSFORMERS
from tests.families.tiny import Tiny

OLDER: dict[str, Tiny] = {**DEEPFLOYD, **KANDINSKY, **TRANSFORMERS, **RELATIVES}
