"""Files that only grow. After an error they are as long as before, and what was appended is on the disk."""

from __future__ import annotations

import os
from pathlib import Path


class Growing:
    """The file at `path` (made if missing), cut to `end` bytes if given."""

    def __init__(self, path: Path, end: int | None = None) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._file = os.fdopen(handle, "r+b", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        self.end = size if end is None else end
        if self.end != size:
            self._file.truncate(self.end)

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


def sync_directory(path: Path) -> None:
    """Make sure that the names in a directory are on the disk."""
    if os.name != "posix":  # Windows cannot, and need not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
