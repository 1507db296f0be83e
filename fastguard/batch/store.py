"""Where images go: one file each in a directory, or WebDataset shards. What `commit` has returned survives a crash."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastguard.batch.growing import Growing, sync_directory
from fastguard.batch.pictures import Picture
from fastguard.batch.request import Request
from fastguard.files import finite, write_atomic

_SHARD = "shard-{:06d}.tar"
_BLOCK = 512
_TAKEN_OUT = "__damaged__"  # webdataset skips such members

Sample = tuple[int, int, str | None]  # offset, length and sha256 of both members, headers and padding too


@dataclass(frozen=True)
class Made:
    """A finished image. record: all that is known of it; data: the encoded file, until it is stored; place: where it then is."""

    request: Request
    record: dict[str, Any]
    data: bytes = b""
    place: dict[str, Any] = field(default_factory=dict)


class Directory:
    """An image per file, named by its id."""

    def __init__(self, out: Path, picture: Picture) -> None:
        self.out, self.picture = out, picture

    def open(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Remove what a killed run left half written."""
        for leftover in self.out.glob(".*.tmp"):
            leftover.unlink()

    def holds(self, line: Mapping[str, Any]) -> bool:
        """Whether the image of a manifest line is still there, whole. It is read only if the file was touched since."""
        path = self.out / str(line.get("file"))
        try:
            status = path.stat()
            if status.st_size != line.get("bytes"):
                return False
            return status.st_mtime_ns == line.get("mtime_ns") or hashlib.sha256(
                path.read_bytes()
            ).hexdigest() == line.get("sha256")
        except OSError:
            return False

    def read(self, line: Mapping[str, Any]) -> bytes:
        """The image's file, of a manifest line."""
        return (self.out / line["file"]).read_bytes()

    def path(self, request: Request) -> Path:
        return self.out / (request.id + self.picture.ending)

    def prepare(self, made: Made) -> Made:
        """Write the file; from any thread. The manifest does not speak of it yet."""
        path = self.path(made.request)
        write_atomic(path, made.data)
        return replace(made, data=b"", place=self.place(path, made.data))

    @staticmethod
    def place(path: Path, data: bytes) -> dict[str, Any]:
        """What the manifest says of a file."""
        digest = hashlib.sha256(data).hexdigest()
        return {"file": path.name, "bytes": len(data), "mtime_ns": path.stat().st_mtime_ns, "sha256": digest}

    def commit(self, made: Sequence[Made]) -> list[dict[str, Any]]:
        """Make sure that the files' names are on the disk too, and return the manifest's lines."""
        sync_directory(self.out)
        return [m.record | m.place for m in made]

    def close(self) -> None:
        pass


class Shards:
    """WebDataset shards of at most `size` images: per image KEY.png (or .jpg, .webp) and KEY.json with its record, KEY its id.

    An image is appended to the last shard and flushed before the manifest says so. After a crash that shard is cut back to what the
    manifest knows, and goes on. A sample whose bytes are no longer those that were written is made again, at the end.
    """

    def __init__(self, out: Path, picture: Picture, size: int) -> None:
        self.out, self.picture, self.size = out, picture, size
        self._index, self._count = -1, size
        self._file: Growing | None = None
        self._damaged: set[tuple[str, int]] = set()  # shard and offset

    def open(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Read every sample that is recorded, take out what is damaged, and cut off what is not recorded."""
        samples: dict[str, list[Sample]] = {}
        for line in lines:
            samples.setdefault(line["file"], []).append((line["offset"], line["bytes"], line.get("sha256")))
        for name, own in samples.items():
            self._damaged.update((name, offset) for offset in _take_out_damaged(self.out / name, own))
        self._index = max(map(_index, samples), default=-1)
        for shard in self.out.glob(_SHARD.replace("{:06d}", "*")):
            if _index(shard.name) > self._index:
                shard.unlink()
        last = _SHARD.format(self._index)
        own = samples.get(last, [])
        end = max((offset + length for offset, length, _ in own), default=0)
        # One that lost its end stays as it is: a place in a shard is of one sample for ever.
        if own and (self.out / last).exists() and (self.out / last).stat().st_size >= end:
            self._count, self._file = len(own), Growing(self.out / last, end)

    def holds(self, line: Mapping[str, Any]) -> bool:
        """Whether the sample of a manifest line was whole when the shards were opened."""
        return (line["file"], line["offset"]) not in self._damaged

    def read(self, line: Mapping[str, Any]) -> bytes:
        """The image's file, of a manifest line."""
        with (self.out / line["file"]).open("rb") as shard:
            shard.seek(line["offset"])
            sample = io.BytesIO(shard.read(line["bytes"]))
        with tarfile.open(fileobj=sample) as tar:
            return tar.extractfile(f"{line['id']}{self.picture.ending}").read()  # type: ignore[union-attr]

    def path(self, request: Request) -> None:
        """No image can be found by its name."""
        return None

    def prepare(self, made: Made) -> Made:
        return made

    def commit(self, made: Sequence[Made]) -> list[dict[str, Any]]:
        """Append the images, flush, and return the manifest's lines: shard, offset, length, checksum. On an OSError the shard is cut back."""
        lines = []
        rest = list(made)
        while rest:
            if self._file is None or self._count >= self.size:
                self._next()
            now, rest = rest[: self.size - self._count], rest[self.size - self._count :]
            members = [self._members(m) for m in now]
            offset = self._file.append(b"".join(members))  # type: ignore[union-attr]
            self._count += len(now)
            for m, data in zip(now, members, strict=True):
                place = {"file": _SHARD.format(self._index), "offset": offset, "bytes": len(data)}
                lines.append(m.record | place | {"sha256": hashlib.sha256(data).hexdigest()})
                offset += len(data)
        return lines

    def close(self) -> None:
        """End the last shard as tar archives end."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.append(bytes(2 * _BLOCK))
            finally:
                file.close()

    def _members(self, made: Made) -> bytes:
        record = json.dumps(finite(made.record), allow_nan=False, ensure_ascii=False).encode()
        parts = []
        for ending, data in ((self.picture.ending, made.data), (".json", record)):
            info = tarfile.TarInfo(made.request.id + ending)
            info.size, info.mode = len(data), 0o644
            parts += [info.tobuf(tarfile.GNU_FORMAT), data, bytes(-len(data) % _BLOCK)]
        return b"".join(parts)

    def _next(self) -> None:
        self.close()
        self._index, self._count = self._index + 1, 0
        self._file = Growing(self.out / _SHARD.format(self._index), 0)
        sync_directory(self.out)


def _take_out_damaged(shard: Path, samples: Sequence[Sample]) -> set[int]:
    """The offsets of samples that are not what was written. In the place of such a one stands a member that readers skip, so the
    others stay where they are; a shard that ends within one is cut back to the one before it."""
    if not shard.exists():
        return {offset for offset, _, _ in samples}
    damaged = []
    with shard.open("rb") as file:
        for offset, length, digest in sorted(samples):
            file.seek(offset)
            if hashlib.sha256(file.read(length)).hexdigest() != digest:
                damaged.append((offset, length))
    if damaged:
        with shard.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for offset, length in damaged:
                if offset + length <= size:
                    info = tarfile.TarInfo(_TAKEN_OUT)
                    info.size = length - _BLOCK
                    file.seek(offset)
                    file.write(info.tobuf(tarfile.GNU_FORMAT))
                elif offset < size:
                    size = file.truncate(offset)
            file.flush()
            os.fsync(file.fileno())
    return {offset for offset, _ in damaged}


def _index(name: str) -> int:
    return int(name.removeprefix("shard-").removesuffix(".tar"))
