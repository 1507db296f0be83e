"""Files that only grow. After an error they are as long as before, and what was appended is on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastguard.files import finite


class Growing:
    """The file at `path` (made if missing), cut to `end` bytes."""

    def __init__(self, path: Path, end: int) -> None:
        path.touch()
        self._file, self.end = path.open("r+b", buffering=0), end
        self._file.truncate(end)

    def append(self, data: bytes) -> int:
        """Append, flush to the disk, return the offset. On an OSError (disk full) the file is as it was before."""
        start, view = self.end, memoryview(data)
        try:
            self._file.seek(start)
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        self.end = start + len(data)
        return start

    def close(self) -> None:
        self._file.close()


class JsonLines(Growing):
    """JSON objects, a line each. A crash can leave a last line without its end: it is cut off before anything is appended."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, sum(map(len, whole_lines(path))))

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.append(b"".join(json_bytes(record) + b"\n" for record in records))


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, but for a last one without its end; none if there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def json_bytes(record: Mapping[str, Any]) -> bytes:
    """What is not finite becomes null."""
    return json.dumps(finite(record), allow_nan=False, ensure_ascii=False).encode()


def sync_directory(path: Path) -> None:
    """Make sure that the names in a directory are on the disk."""
    if os.name == "posix":  # Windows cannot, and need not
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
