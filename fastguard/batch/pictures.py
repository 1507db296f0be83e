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
from fastguard.batch.options import FORMATS, Options
from fastguard.files import finite

ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
CHUNK = "fastguard"  # PNG text chunk with the whole record as JSON
_EXIF_IFD, _COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_LARGEST_COMMENT = 65_000  # bytes: a JPEG segment holds 65,533
_BULKY = ("d_curve", "timesteps")


@dataclass(frozen=True)
class Picture:
    """How images are encoded. quality: of jpeg and webp, 1 to 100; png is lossless."""

    format: str = "png"
    quality: int = 95

    def __post_init__(self) -> None:
        checks.choice("format", self.format, FORMATS)
        checks.integer("quality", self.quality, 1, 100)

    @classmethod
    def of(cls, options: Options) -> Picture:
        return cls(options.format, 95 if options.quality is None else options.quality)

    @property
    def ending(self) -> str:
        return ENDINGS[self.format]

    def encode(self, image: Image.Image, record: dict[str, Any]) -> bytes:
        """The file's bytes. A JPEG whose record is too long for it is left without the curve, and in the end without a record."""
        buffer = io.BytesIO()
        if self.format == "png":
            image.save(buffer, format="PNG", pnginfo=_png_text(record))
            return buffer.getvalue()
        exif = Image.Exif()
        short = {key: value for key, value in record.items() if key not in _BULKY}
        for candidate in (record, short, {"id": record.get("id"), "request": record.get("request")}):
            comment = _ASCII + json.dumps(finite(candidate), allow_nan=False).encode("ascii")
            if self.format == "webp" or len(comment) <= _LARGEST_COMMENT:
                break
        exif.get_ifd(_EXIF_IFD)[_COMMENT] = comment
        image.convert("RGB").save(buffer, format=self.format.upper(), quality=self.quality, exif=exif)
        return buffer.getvalue()


def _png_text(record: dict[str, Any]) -> PngInfo:
    policy, gate = record.get("policy"), record.get("gate_text")
    texts = {
        **{key: record.get(key) for key in ("prompt", "negative_prompt", "seed", "model", "steps", "scheduler")},
        "guidance_scale": record.get("guidance_scale"),
        "policy": policy.get("name") if isinstance(policy, dict) else policy,
        "gate": gate or "none",
        "transition": record.get("transition_text") or "none",
        CHUNK: json.dumps(finite(record), allow_nan=False),
    }
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, "" if text is None else str(text))
    return info


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
