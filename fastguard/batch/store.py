"""Where images go: one file each in a directory, or WebDataset shards. What `commit` has returned survives a crash.

refused   the requests whose names cannot be taken
open      what a killed run left half written goes; lines: the manifest's last ones of all images
holds     whether the image of a manifest line is still there, whole
found     the line of an image that a killed run finished and did not list
read      the image's file, of a manifest line
prepare   write what can be written from any thread; the manifest does not speak of it yet
commit    make it safe, and return the manifest's lines
"""

import hashlib
import io
import logging
import tarfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastguard.batch.pictures import read_record
from fastguard.batch.prompt_files import Problem
from fastguard.batch.request import Request
from fastguard.files import Growing, json_bytes, sync_directory, write_atomic

logger = logging.getLogger("fastguard")

_BLOCK = 512

Line = Mapping[str, Any]  # of the manifest


@dataclass(frozen=True)
class Made:
    """A finished image. record: all that is known of it, and where it is once it is stored; until then image, then data, the encoded file."""

    request: Request
    record: dict[str, Any]
    image: Any = None
    data: bytes = b""


class Directory:
    """An image per file, named by its id."""

    def __init__(self, out: Path, ending: str) -> None:
        self.out, self.ending = out, ending

    def refused(self, requests: Iterable[Request], listed: Iterable[str]) -> list[Problem]:
        if not ignores_case(self.out):
            return []
        # Files that no line speaks of yet are there, too, after a crash.
        taken = [*listed, *(path.stem for path in self.out.glob(f"*{self.ending}"))]
        owners = {_same_file(name): name for name in taken}
        return [
            Problem.of(request, f"id={request.id!r}: is the same file as id={owner!r} here")
            for request in requests
            if (owner := owners.setdefault(_same_file(request.id), request.id)) != request.id
        ]

    def open(self, lines: Iterable[Line]) -> None:
        for leftover in self.out.glob(".*.tmp"):
            leftover.unlink()

    def holds(self, line: Line) -> bool:
        path = self.out / str(line.get("file"))
        try:
            status = path.stat()
            untouched = (status.st_size, status.st_mtime_ns) == (line.get("bytes"), line.get("mtime_ns"))
            return untouched or _sha256(path.read_bytes()) == line.get("sha256")
        except OSError:
            return False

    def found(self, name: str, digest: str) -> dict[str, Any] | None:
        path = self.out / (name + self.ending)
        record = read_record(path)
        # An id alone is no whole record.
        if not record or "versions" not in record or (record.get("id"), record.get("request")) != (name, digest):
            return None
        return record | self._place(path, path.read_bytes())

    def read(self, line: Line) -> bytes:
        return (self.out / line["file"]).read_bytes()

    def prepare(self, made: Made) -> Made:
        path = self.out / (made.request.id + self.ending)
        write_atomic(path, made.data)
        return replace(made, data=b"", record=made.record | self._place(path, made.data))

    def commit(self, made: Sequence[Made]) -> list[dict[str, Any]]:
        sync_directory(self.out)  # the files' names
        return [m.record for m in made]

    def close(self) -> None:
        pass

    @staticmethod
    def _place(path: Path, data: bytes) -> dict[str, Any]:
        stamp = path.stat().st_mtime_ns
        return {"file": path.name, "bytes": len(data), "mtime_ns": stamp, "sha256": _sha256(data)}


class Shards:
    """WebDataset shards of at most `size` images: per image KEY.png (or .jpg, .webp) and KEY.json with its record, KEY its id.

    An image is appended to the last shard and flushed before the manifest says so. After a crash that shard is cut back to what the
    manifest knows, and goes on. Of one whose bytes are no longer those that were written all images are made again, in others.
    """

    def __init__(self, out: Path, ending: str, size: int) -> None:
        self.out, self.ending, self.size = out, ending, size
        self._index, self._count = -1, 0
        self._file: Growing | None = None

    def refused(self, requests: Iterable[Request], listed: Iterable[str]) -> list[Problem]:
        dotted = [request for request in requests if "." in request.id]
        return [Problem.of(r, f"id={r.id!r}: must have no '.' in a WebDataset shard") for r in dotted]

    def open(self, lines: Iterable[Line]) -> None:
        """Every recorded sample is read, too: a shard with a damaged one is set aside."""
        samples: dict[str, list[Line]] = {}
        for line in lines:
            samples.setdefault(line["file"], []).append(line)
        for name, own in samples.items():
            shard = self.out / name
            if shard.exists() and any(_sha256(self._sample(line)) != line["sha256"] for line in own):
                shard.rename(shard.with_suffix(".damaged"))
                logger.warning("%s is damaged: its images are made again, it is now %s.damaged", name, shard.stem)
        self._index = max(map(_number, samples), default=-1)
        for shard in self.out.glob("shard-*.tar"):
            if _number(shard.name) > self._index:
                shard.unlink()
        if self._last().exists():
            own = samples[self._last().name]
            end = max(line["offset"] + line["bytes"] for line in own)
            self._count, self._file = len(own), Growing(self._last(), end)

    def holds(self, line: Line) -> bool:
        return (self.out / line["file"]).exists()

    def found(self, name: str, digest: str) -> None:
        """None: what no line speaks of was cut off."""

    def read(self, line: Line) -> bytes:
        with tarfile.open(fileobj=io.BytesIO(self._sample(line))) as tar:
            return tar.extractfile(f"{line['id']}{self.ending}").read()  # type: ignore[union-attr]

    def prepare(self, made: Made) -> Made:
        return made

    def commit(self, made: Sequence[Made]) -> list[dict[str, Any]]:
        lines = []
        for m in made:
            if self._file is None or self._count >= self.size:
                self.close()
                self._index, self._count = self._index + 1, 0
                self._file = Growing(self._last(), 0)
                sync_directory(self.out)
            data = self._members(m)
            place = {"file": self._last().name, "offset": self._file.append(data), "bytes": len(data)}
            lines.append(m.record | place | {"sha256": _sha256(data)})
            self._count += 1
        return lines

    def close(self) -> None:
        """End the last shard as tar archives end."""
        if self._file is not None:
            self._file.append(bytes(2 * _BLOCK))
            self._file.close()
            self._file = None

    def _sample(self, line: Line) -> bytes:
        with (self.out / line["file"]).open("rb") as shard:
            shard.seek(line["offset"])
            return shard.read(line["bytes"])

    def _last(self) -> Path:
        return self.out / f"shard-{self._index:06d}.tar"

    def _members(self, made: Made) -> bytes:
        parts = []
        for ending, data in ((self.ending, made.data), (".json", json_bytes(made.record))):
            info = tarfile.TarInfo(made.request.id + ending)
            info.size, info.mode = len(data), 0o644
            parts += [info.tobuf(tarfile.GNU_FORMAT), data, bytes(-len(data) % _BLOCK)]
        return b"".join(parts)


def _number(shard: str) -> int:
    return int(shard.removeprefix("shard-").removesuffix(".tar"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def ignores_case(out: Path) -> bool:
    """Whether "A.png" and "a.png" are the same file in `out`: tried on the names of directories that exist."""
    for path in (out.absolute(), *out.absolute().parents):
        other = path.with_name(path.name.swapcase())
        if path.exists() and path.name != other.name:
            return other.exists() and other.samefile(path)
    return False


def _same_file(name: str) -> str:
    """What a file system that ignores case compares. It also takes the composed and the decomposed form of a letter for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
