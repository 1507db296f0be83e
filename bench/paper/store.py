"""results.jsonl and the images beside it: whatever moment the process is killed at, the next run goes on from whole units.

A unit is one batch of images of one method and guidance scale. Its images are written first, each under a temporary name and then
renamed; then its lines are appended in ONE write and flushed. The file is only ever appended to, so what a kill can leave is an
incomplete last unit: the next `add` cuts it off, and its images are made again under the same names. Opening adds a lock and changes
nothing, since the folder may turn out to be someone else's.

What is there is known by image, not by unit: a batch of another size overlaps several units, and a picture may have been deleted. A line
that is kept is never written again.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from fastguard.files import finite, write_atomic

RESULTS = "results.jsonl"


class Store:
    """The results of one output folder. One process at a time: RuntimeError while another has it."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.path = out, out / RESULTS
        self.rows: list[dict[str, Any]] = []
        self._kept: set[str] = set()  # images that have a line
        self._lock = (out / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RuntimeError(f"out={str(out)!r}: another process is at work there") from None
        try:
            self._whole = self._units(self.path.read_bytes()) if self.path.exists() else 0
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._lock.close()

    def lacking(self, images: Iterable[str]) -> list[str]:
        """Those of `images` (relative to the folder) that have no line or whose file is gone."""
        return [image for image in images if image not in self._kept or not (self.out / image).is_file()]

    def clean(self) -> None:
        """Remove what a killed run left half-written. Only for a folder that is known to be the benchmark's."""
        for left in self.out.rglob(".*.tmp"):
            left.unlink()

    def _units(self, data: bytes) -> int:
        """Take in the whole units of `data`; returns how many bytes they are. ValueError for damage that no kill makes."""
        whole = at = number = 0
        unit: list[dict[str, Any]] = []
        for raw in data.split(b"\n")[:-1]:  # what follows the last line end is empty or torn
            number, at = number + 1, at + len(raw) + 1
            try:
                row = json.loads(raw)
                name, count, place, image = (row[k] for k in ("unit", "unit_images", "unit_place", "image"))
            except (ValueError, KeyError, TypeError):
                if at == len(data):
                    return whole  # a torn last line that happens to end in a line end
                raise ValueError(f"{self.path}: line {number} is damaged; no interrupted run leaves that") from None
            if place != len(unit) or (unit and unit[0]["unit"] != name) or image in self._kept:
                raise ValueError(f"{self.path}: line {number} does not follow the line before it (unit {name!r})")
            unit.append(row)
            if len(unit) == count:
                self._take(unit)
                unit, whole = [], at
        return whole

    def _take(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows.extend(rows)
        self._kept.update(row["image"] for row in rows)

    def add(self, unit: str, rows: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> None:
        """Keep what is lacking of a finished unit: images[i] at rows[i]["image"] (relative to the folder), then the lines."""
        lacking = set(self.lacking(row["image"] for row in rows))
        for row, image in zip(rows, images, strict=True):
            if row["image"] not in lacking:
                continue
            target = self.out / row["image"]
            target.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            image.save(data, "PNG")
            write_atomic(target, data.getvalue())
        new = [row for row in rows if row["image"] not in self._kept]
        kept = [finite({"unit": unit, "unit_images": len(new), "unit_place": i, **row}) for i, row in enumerate(new)]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept).encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, self._whole)
            written = 0
            while written < len(text):
                written += os.write(handle, text[written:])
            os.fsync(handle)
        finally:
            os.close(handle)
        self._whole += len(text)
        self._take(kept)

    def parquet(self) -> Path | None:
        """All rows as results.parquet; None where pyarrow is not installed."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            return None
        names = list(dict.fromkeys(name for row in self.rows for name in row if name != "details"))
        columns = {name: [row.get(name) for row in self.rows] for name in names}
        columns["details"] = [json.dumps(row.get("details", {})) for row in self.rows]
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), sink)
        return write_atomic(self.out / "results.parquet", sink.getvalue())
