"""Why a pipeline class is not guarded, by name: refused.json, the classes under each reason."""

from __future__ import annotations

import json
from pathlib import Path

NO_BRANCH = "no negative branch: nothing to guard with"
THIRD = "a third branch enters its combination, which the guard would drop"

REASONS: dict[str, str] = {
    name: reason
    for reason, names in json.loads(Path(__file__).with_name("refused.json").read_text()).items()
    for name in names
}


def reason_against(name: str) -> str:
    """Why the pipeline class of this name is not guarded."""
    return REASONS.get(
        name,
        "its guidance is not known (family='probe' takes it if it combines u + g (c - u) with one g above 1 in every row)",
    )
