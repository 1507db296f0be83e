"""The append-only list of finished images: manifest.jsonl, one line per image, and the only thing that says what is done.

A line is written after the image it speaks of is safe. A crash can leave at most a last line without its end: it is cut off before
anything is appended, and its image is found again by its file or made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastguard.batch.growing import Growing
from fastguard.files import finite

NAME = "manifest.jsonl"
_INDEXED = ("request", "file", "offset", "bytes", "mtime_ns", "sha256")


class Manifest:
    """The manifest in `directory`. Reading needs no lock; `open` for appending, by one process at a time."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME
        self._file: Growing | None = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every complete line, oldest first. ValueError with the line's number if one is damaged."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    return  # torn by a crash
                try:
                    line = json.loads(raw)
                    if not isinstance(line, dict) or not isinstance(line.get("id"), str):
                        raise ValueError("is not an object with an id")
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}: line {number} is damaged ({error}); remove it to have its image made again"
                    ) from None
                yield line

    def index(self) -> dict[str, dict[str, Any]]:
        """Per id what says whether its image is still there and the same: of its last line, an image made again has two."""
        return {line["id"]: {key: line[key] for key in _INDEXED if key in line} for line in self.lines()}

    def open(self) -> None:
        """Begin to append; a torn last line is cut off."""
        self._file = Growing(self.path, _end_of_lines(self.path))

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append and flush to the disk. On an OSError (disk full) the manifest is as it was before."""
        if self._file is None:
            raise RuntimeError("the manifest is not open")
        texts = [json.dumps(finite(line), allow_nan=False, ensure_ascii=False) for line in lines]
        self._file.append("".join(text + "\n" for text in texts).encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _end_of_lines(path: Path) -> int:
    """Length of a file without what follows its last line feed."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))
