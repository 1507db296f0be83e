"""Image files that say how they were made: the record is in the PNG's text, or in the EXIF comment of JPEG and WebP."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastguard import checks
from fastguard.batch.options import FORMATS, METADATA, JobOptions
from fastguard.files import finite

ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
CHUNK = "fastguard"  # PNG text chunk with the whole record as JSON
PARAMETERS = "parameters"  # PNG text chunk of web UIs; others, say "prompt", have meanings of their own in node editors
_EXIF_IFD, _COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_LARGEST_COMMENT = 65_000  # bytes: a JPEG segment holds 65,533
_BULKY = ("d_curve", "share_curve", "timesteps")


@dataclass(frozen=True)
class Picture:
    """How images are encoded. quality: of jpeg and webp, 1 to 100; png is lossless.

    metadata: "full", the whole record is in the file; "id", the image's id and its request's digest alone; "none".
    """

    format: str = "png"
    quality: int = 95
    metadata: str = "full"

    def __post_init__(self) -> None:
        checks.choice("format", self.format, FORMATS)
        checks.integer("quality", self.quality, 1, 100)
        checks.choice("metadata", self.metadata, METADATA)

    @classmethod
    def of(cls, options: JobOptions) -> Picture:
        return cls(options.format, 95 if options.quality is None else options.quality, options.metadata)

    @property
    def ending(self) -> str:
        return ENDINGS[self.format]

    def encode(self, image: Image.Image, record: dict[str, Any]) -> bytes:
        """The file's bytes. A JPEG whose record is too long for it is left without the curve, and in the end without a record."""
        if self.metadata == "id":
            record = _named(record)
        said = self.metadata != "none"
        buffer = io.BytesIO()
        if self.format == "png":
            image.save(buffer, format="PNG", pnginfo=_png_text(record) if said else None)
        else:
            exif = Image.Exif()
            if said:
                exif.get_ifd(_EXIF_IFD)[_COMMENT] = _comment(
                    record, None if self.format == "webp" else _LARGEST_COMMENT
                )
            image.convert("RGB").save(buffer, format=self.format.upper(), quality=self.quality, exif=exif)
        return buffer.getvalue()


def _named(record: dict[str, Any]) -> dict[str, Any]:
    return {"id": record.get("id"), "request": record.get("request")}


def _comment(record: dict[str, Any], most: int | None) -> bytes:
    short = {key: value for key, value in record.items() if key not in _BULKY}
    for candidate in (record, short, _named(record)):
        comment = _ASCII + json.dumps(finite(candidate), allow_nan=False).encode("ascii")
        if most is None or len(comment) <= most:
            break
    return comment


def _png_text(record: dict[str, Any]) -> PngInfo:
    info = PngInfo()
    if "prompt" in record:
        info.add_itxt(PARAMETERS, parameters(record))
    info.add_itxt(CHUNK, json.dumps(finite(record), allow_nan=False))
    return info


def parameters(record: dict[str, Any]) -> str:
    """The record as web UIs write it: the prompt, a line with the negative one, a line of "Name: value" with commas between them."""
    values = {
        "Steps": record["steps"],
        "Sampler": str(record["scheduler"]).removesuffix("Scheduler"),
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
        "Guard": record["policy"],
        "Guard gate": record["gate_text"],
        "Guard transition": record["transition_text"],
    }
    lines = [
        record["prompt"],
        *([f"Negative prompt: {record['negative_prompt']}"] if record["negative_prompt"] else []),
    ]
    return "\n".join(
        [*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value not in (None, ""))]
    )


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def read_record(source: str | os.PathLike[str] | io.BytesIO) -> dict[str, Any] | None:
    """The record inside an image file; None if the file is missing, damaged or has none."""
    try:
        with Image.open(source) as image:
            image.load()  # all pixels, with the checksums
            if image.format == "PNG":
                record = json.loads(image.text[CHUNK])  # type: ignore[attr-defined]
            else:
                comment = image.getexif().get_ifd(_EXIF_IFD)[_COMMENT]
                raw = comment if isinstance(comment, bytes) else str(comment).encode()
                record = json.loads(raw.removeprefix(_ASCII))
    except (OSError, SyntaxError, KeyError, AttributeError, ValueError):
        return None
    return record if isinstance(record, dict) else None
