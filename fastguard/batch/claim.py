"""An output directory belongs to one set of settings, and to one process at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastguard.batch.manifest import NAME as MANIFEST
from fastguard.files import read_json, write_json

SETTINGS, LOCK = "settings.json", ".lock"
FORMAT = "fastguard_generate"
"""The key of the settings that says whose they are; its value is the version of what a run writes."""
BOOKS = {SETTINGS, MANIFEST, "rejected.jsonl", "report.json"}


def check(out: Path, settings: dict[str, Any]) -> None:
    """ValueError if `out` holds something else or images of other settings (the message says which). Writes nothing."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out}: is a file, must be a directory")
    for parent in out.parents:
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(20, "Not a directory", str(parent))
            break
    names = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")] if out.exists() else []
    if not names:
        return
    if SETTINGS not in names:
        raise ValueError(f"out={out}: is not empty and has no {SETTINGS}; choose another directory")
    there = read_json(out / SETTINGS)
    ours = isinstance(there, dict) and FORMAT in there
    if ours and set(names) <= BOOKS and _empty(out / MANIFEST):
        return  # of a run that made no image: it pins nothing
    if found := list(differences(there, settings)):
        raise ValueError(f"out={out}: was made with other settings: {'; '.join(found)}")


def _empty(path: Path) -> bool:
    return not path.exists() or not path.stat().st_size


def check_free(out: Path) -> None:
    """ValueError if another process works in `out`."""
    if (out / LOCK).exists():
        with _locked(out / LOCK):
            pass


@contextmanager
def claim(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Make `out` this process' directory for as long as the context lasts; errors as in `check`, and if another process has it."""
    check(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out / LOCK):
        check(out, settings)
        if not (out / SETTINGS).exists() or read_json(out / SETTINGS) != settings:
            write_json(out / SETTINGS, settings)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes. The system lets go of it when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs into one directory are the user's own risk
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out={path.parent}: another process is writing there") from None
        yield


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What two JSON values disagree in, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {json.dumps(there)} there, {json.dumps(here)} here"
