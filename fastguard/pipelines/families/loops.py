"""Whether a pipeline's loop is still the one that its family was written for.

`python -m fastguard.pipelines.families.loops` writes loops.json: a hash of the source of `__call__` of every class.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("loops.json")


def fingerprint(pipeline_class: Any) -> str | None:
    """A hash of the source of the class's `__call__`; None where there is none to read."""
    try:
        source = inspect.getsource(inspect.unwrap(pipeline_class.__call__))
    except (TypeError, OSError):
        return None
    return hashlib.sha256(inspect.cleandoc(source).encode()).hexdigest()[:16]


def changed(pipeline_class: type) -> str | None:
    """One line where the loop is not the one that the guard was checked with; None where it is, or nobody knows."""
    known = json.loads(_FILE.read_text())
    expected, found = known["loops"].get(pipeline_class.__name__), fingerprint(pipeline_class)
    if expected is None or found is None or expected == found:
        return None
    return (
        f"{pipeline_class.__name__}: its loop is not the one of diffusers {known['diffusers']} that the guard was checked with; "
        f"enable(..., verify=True) checks this one"
    )


def main() -> None:
    import diffusers

    from fastguard.pipelines.families import FAMILIES, OWN_FAMILIES

    pipelines = [*(family.pipelines for family in FAMILIES), *(family.pipelines for family in OWN_FAMILIES)]
    names = sorted(name for some in pipelines for name in some)
    loops = {name: mark for name in names if (mark := fingerprint(getattr(diffusers, name, None)))}
    _FILE.write_text(json.dumps({"diffusers": diffusers.__version__, "loops": loops}, indent=1) + "\n")


if __name__ == "__main__":
    main()
