"""Files that are either complete or not there: written beside their target, flushed, then renamed over it.

Files that only grow: after an error they are as long as before, and what was appended is on the disk. How errors show values.
"""

import json
import math
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def short(value: Any) -> str:
    """repr of at most 60 characters, for error messages: what a user wrote can be megabytes long."""
    try:
        text = repr(value[:100] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, a list in a list in a list ...
        text = f"<{type(value).__name__} too large to show>"
    return text if len(text) <= 60 else f"{text[:56]}..."


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write `text`: it cannot write a lone surrogate, which JSON's "\\ud800" becomes."""
    return not re.search("[\ud800-\udfff]", text)


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) to `path` so that a reader, or a crash, sees the old file or the new one and never a part.

    Raises OSError (no such directory, no permission, disk full); the temporary file is then removed.
    """
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        file = temporary.open("xb")
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None: JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented strict JSON, atomically. ValueError if it holds a NaN or an infinity (see `finite`)."""
    return write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def parse_json(text: str) -> Any:
    """Strict JSON: NaN, infinities and a key given twice raise ValueError (RecursionError: what is nested too deeply)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"the key {short(twice[0])} occurs twice")
        return dict(pairs)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def read_json(path: str | os.PathLike[str]) -> Any:
    """`parse_json` of a file. ValueError naming `path`."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{os.fspath(path)}: not valid JSON: {error}") from None


class Growing:
    """The file at `path` (made if missing), cut to `end` bytes."""

    def __init__(self, path: Path, end: int) -> None:
        self._file, self.end = path.open("ab", buffering=0), end
        self._file.truncate(end)

    def append(self, data: bytes) -> int:
        """Append, flush to the disk, return the offset. On an OSError (disk full) the file is as it was before."""
        start, view = self.end, memoryview(data)
        try:
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
