"""A contact sheet: small pictures of a job's images with their ids, and what the guard says of them in the colour of the frame."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from fastguard.batch.summary import caught
from fastguard.files import write_atomic

NAME = "sheet.png"
TILE, LABEL, FRAME = 128, 14, 3  # pixels
MOST = 400  # images; more are no sheet that anybody looks at
PLAIN, CAUGHT, SUSPECT = "#888888", "#1f77b4", "#d62728"


def write_sheet(out: Path, lines: Iterable[Mapping[str, Any]], read: Any) -> Path | None:
    """sheet.png of the first `MOST` images. lines: of the manifest; read(line): the image's file, bytes. None if there is no image.

    Frames: red if suspect, blue if caught (by the gate, or its prompt by screening), grey otherwise.
    """
    shown = list(lines)[:MOST]
    if not shown:
        return None
    columns = min(len(shown), 10)
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(shown):
        x, y = index % columns * TILE, index // columns * (TILE + LABEL)
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=frame(line))
        with Image.open(io.BytesIO(read(line))) as image:
            small = image.convert("RGB")
        scale = (TILE - 2 * FRAME) / max(small.size)
        small = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
        sheet.paste(small, (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2))
        draw.text((x + FRAME, y + TILE), line["id"][-20:], fill="black")
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    return write_atomic(out / NAME, data.getvalue())


def frame(line: Mapping[str, Any]) -> str:
    """The colour of an image's frame."""
    if line.get("suspect"):
        return SUSPECT
    return CAUGHT if caught(line) else PLAIN
