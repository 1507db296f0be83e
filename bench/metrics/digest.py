"""Which files made a number: their contents, in the line that names a network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def digest(paths: Sequence[Path]) -> str:
    """The first 12 digits that `sha256sum FILE` prints; of several files, those of `sha256sum FILES | sha256sum`. OSError if one cannot be read."""
    lines = []
    for path in paths:
        found = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
        lines.append(f"{found.hexdigest()}  {path.name}\n")
    whole = lines[0] if len(lines) == 1 else hashlib.sha256("".join(lines).encode()).hexdigest()
    return whole[:12]
