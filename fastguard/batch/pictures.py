"""Image files that say how they were made: the record is in the PNG's text, or in the EXIF comment of JPEG and WebP."""

import io
import json
import os
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastguard.batch.options import JobOptions
from fastguard.files import finite

ENDINGS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
CHUNK = "fastguard"  # PNG text chunk with the whole record as JSON
PARAMETERS = "parameters"  # PNG text chunk of web UIs; others, say "prompt", have meanings of their own in node editors
_EXIF_IFD, _COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"
_LARGEST_COMMENT = 65_000  # bytes: a JPEG segment holds 65,533
_BULKY = ("d_curve", "share_curve", "timesteps")


def encode(image: Image.Image, record: dict[str, Any], options: JobOptions) -> bytes:
    """The file's bytes in the options' format, quality (95 unless given; png is lossless) and metadata.

    metadata: "full", the whole record is in the file; "id", the image's id and its request's digest alone; "none". A JPEG whose record
    is too long for it is left without the curves, and in the end with what "id" says.
    """
    named = {"id": record.get("id"), "request": record.get("request")}
    slim = {key: value for key, value in record.items() if key not in _BULKY}
    records = {"full": [record, slim, named], "id": [named], "none": []}[options.metadata]
    texts = (json.dumps(finite(candidate), allow_nan=False) for candidate in records)
    kind, buffer = options.format, io.BytesIO()
    if kind == "png":
        info = PngInfo()
        if options.metadata == "full":
            info.add_itxt(PARAMETERS, parameters(record))
        if records:
            info.add_itxt(CHUNK, next(texts))
        image.save(buffer, format="PNG", pnginfo=info)
        return buffer.getvalue()
    exif = Image.Exif()
    for text in texts:
        exif.get_ifd(_EXIF_IFD)[_COMMENT] = _ASCII + text.encode("ascii")
        if kind == "webp" or len(text) <= _LARGEST_COMMENT - len(_ASCII):
            break
    image.convert("RGB").save(buffer, format=kind.upper(), quality=options.quality or 95, exif=exif)
    return buffer.getvalue()


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
    negative = [f"Negative prompt: {record['negative_prompt']}"] if record["negative_prompt"] else []
    told = ", ".join(f"{name}: {_quoted(value)}" for name, value in values.items() if value not in (None, ""))
    return "\n".join([record["prompt"], *negative, told])


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
