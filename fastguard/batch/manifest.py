"""What an output directory says of itself: whose it is (settings.json), who works in it (a lock), what is done (manifest.jsonl).

The manifest is append-only, a line per finished image, and the only thing that says what is done. A line is written after the image it
speaks of is safe; an image whose line a crash tore off is found again by its file or made again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from fastguard.batch.request import Request
from fastguard.files import read_json, whole_lines, write_json

NAME = "manifest.jsonl"
SETTINGS, LOCK = "settings.json", ".lock"
FORMAT = "fastguard_generate"
"""The key of the settings that says whose they are; its value is the version of what a run writes."""
INDEXED = ("request", "file", "offset", "bytes", "mtime_ns", "sha256", "suspect")
BOOKS = {SETTINGS, NAME, "rejected.jsonl", "report.json"}


def check(out: Path, settings: dict[str, Any]) -> None:
    """ValueError if `out` holds something else or images of other settings (the message says which). Writes nothing."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out={there}: is a file, must be a directory")
    names = {path.name for path in out.glob("[!.]*")}
    if not names:
        return
    if SETTINGS not in names:
        raise ValueError(f"out={out}: is not empty and has no {SETTINGS}; choose another directory")
    before = read_json(out / SETTINGS)
    listed = NAME in names and (out / NAME).stat().st_size
    if isinstance(before, dict) and FORMAT in before and names <= BOOKS and not listed:
        return  # of a run that made no image: it pins nothing
    if found := list(differences(before, settings)):
        raise ValueError(f"out={out}: was made with other settings: {'; '.join(found)}")


def check_free(out: Path) -> None:
    """ValueError if another process works in `out`."""
    if (out / LOCK).exists():
        _locked(out / LOCK).close()


@contextmanager
def claim(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Make `out`, for which `check` was passed, this process' directory for as long as the context lasts."""
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out / LOCK):
        check(out, settings)  # another process may have been here
        if not (out / SETTINGS).exists() or read_json(out / SETTINGS) != settings:
            write_json(out / SETTINGS, settings)
        yield


def _locked(path: Path) -> TextIO:
    """Hold `path` against other processes until it is closed: by the system when this process ends, however it ends."""
    file = path.open("w")
    with suppress(ImportError):  # Windows: two runs into one directory are the user's own risk
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(f"out={path.parent}: another process is writing there") from None
    return file


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What two JSON values disagree in, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {json.dumps(there)} there, {json.dumps(here)} here"


def lines(out: Path) -> Iterator[dict[str, Any]]:
    """Every complete line of the manifest in `out`, oldest first. ValueError with the line's number if one is damaged."""
    path = out / NAME
    for number, raw in enumerate(whole_lines(path), 1):
        try:
            line = json.loads(raw)
            if not isinstance(line, dict) or not isinstance(line.get("id"), str):
                raise ValueError("is not an object with an id")
        except ValueError as error:
            told = f"line {number} is damaged ({error}); remove it to have its image made again"
            raise ValueError(f"{path}: {told}") from None
        yield line


def index(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per id what a run has to know of its image all the time: of its last line, an image made again has two."""
    return {line["id"]: {key: line[key] for key in INDEXED if key in line} for line in found}


def latest(out: Path, requests: Sequence[Request], read: Callable[[dict[str, Any]], Any] = dict) -> list[Any]:
    """The last line of each of these images, or what `read` makes of it, in their order, as far as they are there."""
    wanted = {request.id for request in requests}
    last = {line["id"]: read(line) for line in lines(out) if line["id"] in wanted}
    return [last[request.id] for request in requests if request.id in last]
