"""Ids as the names of files: which of them are one file in a directory that ignores case."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from fastguard.batch.request import Request
from fastguard.batch.tables import Problem


def ignores_case(out: Path) -> bool:
    """Whether "A.png" and "a.png" are the same file in `out`: tried on the names of directories that exist."""
    for path in (out.absolute(), *out.absolute().parents):
        other = path.with_name(path.name.swapcase())
        if path.exists() and path.name != other.name:
            return other.exists() and other.samefile(path)
    return False


def clashes(requests: Iterable[Request], taken: Iterable[str]) -> list[Problem]:
    """The requests whose file is, where case is ignored, that of another id: of an earlier request or of those that are `taken`."""
    owners = {_key(name): name for name in taken}
    found = []
    for request in requests:
        owner = owners.setdefault(_key(request.id), request.id)
        if owner != request.id:
            found.append(Problem.of(request, f"id={request.id!r}: is the same file as id={owner!r} here"))
    return found


def _key(name: str) -> str:
    """What such a file system compares. It also takes the composed and the decomposed form of a letter for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
