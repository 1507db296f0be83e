"""What a finished job tells: report.json, the summary's text, and sheet.png, small pictures in frames whose colour says what the guard says."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from fastguard.batch import manifest
from fastguard.batch.manifest import FORMAT
from fastguard.batch.prompt_files import Problem
from fastguard.batch.request import Request
from fastguard.files import write_atomic

REPORT, SHEET = "report.json", "sheet.png"
TILE, LABEL, FRAME = 128, 14, 3  # pixels of the sheet
SHOWN = 400  # images on it; more are no sheet that anybody looks at
PLAIN, CAUGHT, SUSPECT = "#888888", "#1f77b4", "#d62728"  # caught: by the gate, or its prompt by screening
LISTED = 10_000  # images that report.json lists; beyond, the manifest is the list
NAMED = 20  # rejected images that the summary names


def caught(line: Mapping[str, Any]) -> bool:
    """Whether the gate caught an image, or screening its prompt."""
    return bool((line.get("gate") or {}).get("caught") or (line.get("screen") or {}).get("flagged"))


COUNTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "caught": ("caught", caught),
    "transitions": ("transitions", lambda line: line.get("transition_step") is not None),
    "forced": ("of them forced by the deadline", lambda line: line.get("forced")),
    "suspect": ("suspect of being copies", lambda line: line.get("suspect")),
    "remade": ("made again", lambda line: line.get("remake_of")),
    "blacked": ("blacked by the safety checker", lambda line: line.get("blacked")),
    "non_finite": ("NOT FINITE", lambda line: line.get("non_finite") is not None or line.get("vae_non_finite")),
    "cut": (
        "whose prompt was cut at the encoder's length",
        lambda line: line.get("prompt_cut") or line.get("negative_prompt_cut"),
    ),
}
"""What is counted of a job's images: the words of the summary, and whether an image's line in the manifest says so."""

_ALWAYS = ("caught", "transitions", "forced")  # in the summary's text even if there are none


@dataclass(frozen=True)
class Summary:
    """total: images of the job that are there; made: of them by this run; counts: see `COUNTS`; rejected: rows that could not be made.

    rejected_ids: of the images and rows that were rejected, as far as they had one.
    """

    total: int
    made: int
    counts: dict[str, int]
    rejected: int
    rejected_ids: tuple[str, ...]
    report: Path

    def __getattr__(self, name: str) -> int:
        """`summary.caught` and the like."""
        try:
            return self.__dict__["counts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __str__(self) -> str:
        told = [f"{COUNTS[name][0]}: {n}" for name, n in self.counts.items() if n or name in _ALWAYS]
        text = f"{self.total} images, {self.made} of them made now; {', '.join(told)}"
        if not self.rejected:
            return text
        more = ", ..." if len(self.rejected_ids) > NAMED else ""
        names = f" ({', '.join(self.rejected_ids[:NAMED])}{more})" if self.rejected_ids else ""
        return f"{text}; rejected rows: {self.rejected}{names}"


def summarize(
    out: Path, requests: Sequence[Request], settings: Mapping[str, Any], *, made: int, problems: Sequence[Problem]
) -> Summary:
    """Write report.json: the settings, the counts and, of small jobs, the manifest's lines in the order of the requests."""
    found = manifest.latest(out, requests, lambda line: [bool(holds(line)) for _, holds in COUNTS.values()])
    counts = {name: sum(flags[i] for flags in found) for i, name in enumerate(COUNTS)}
    values = [problem.values for problem in problems]
    ids = tuple(str(row["id"]) for row in values if isinstance(row, Mapping) and row.get("id") is not None)
    report = {
        FORMAT: 2,
        "settings": dict(settings),
        "total": len(found),
        "rejected": len(problems),
        "rejected_ids": list(ids[:LISTED]),
        **counts,
        "manifest": manifest.NAME,
    }
    # Indented, but with a line an image.
    head = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False).removesuffix("\n}")
    images = "null"
    if len(requests) <= LISTED:
        rows = manifest.latest(out, requests, lambda line: json.dumps(line, ensure_ascii=False))
        images = "[\n    {}\n  ]".format(",\n    ".join(rows))
    written = write_atomic(out / REPORT, f'{head},\n  "images": {images}\n}}\n')
    return Summary(len(found), made, counts, len(problems), ids, written)


def write_sheet(out: Path, lines: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], bytes]) -> None:
    """sheet.png of the images of these lines of the manifest. read(line): the image's file."""
    columns = min(len(lines), 10)
    rows = -(-len(lines) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, line in enumerate(lines):
        x, y = index % columns * TILE, index // columns * (TILE + LABEL)
        colour = SUSPECT if line.get("suspect") else CAUGHT if caught(line) else PLAIN
        with Image.open(io.BytesIO(read(line))) as image:
            small = ImageOps.pad(image.convert("RGB"), (TILE - 2 * FRAME, TILE - 2 * FRAME), color=colour)
        sheet.paste(ImageOps.expand(small, FRAME, colour), (x, y))
        draw.text((x + FRAME, y + TILE), line["id"][-20:], fill="black")
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    write_atomic(out / SHEET, data.getvalue())
