"""Whether a pipeline's loop is still the one that its family was written for: loops.json has a hash of the source of every `__call__`."""

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
