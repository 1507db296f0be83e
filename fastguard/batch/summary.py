"""report.json: what a finished job made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard.batch.manifest import Manifest
from fastguard.batch.request import Request
from fastguard.batch.tables import Problem
from fastguard.files import write_atomic

REPORT = "report.json"
LISTED = 10_000  # images that report.json lists; beyond, the manifest is the list
NAMED = 20  # rejected images that the summary names


def caught(line: Mapping[str, Any]) -> bool:
    """Whether the gate caught an image, or screening its prompt."""
    return bool((line.get("gate") or {}).get("caught") or (line.get("screen") or {}).get("flagged"))


COUNTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "caught": ("caught", lambda line: caught(line)),
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
    out: Path,
    requests: Sequence[Request],
    manifest: Manifest,
    settings: Mapping[str, Any],
    *,
    made: int,
    problems: Sequence[Problem],
) -> Summary:
    """Write report.json: the settings, the counts and, of small jobs, the manifest's lines in the order of the requests."""
    wanted = {request.id for request in requests}
    small = len(wanted) <= LISTED
    lines: dict[str, dict[str, Any]] = {}
    flags: dict[str, list[str]] = {}
    for line in manifest.lines():
        if line["id"] in wanted:
            flags[line["id"]] = [name for name, (_, holds) in COUNTS.items() if holds(line)]
            if small:
                lines[line["id"]] = line
    counts = {name: sum(name in own for own in flags.values()) for name in COUNTS}
    values = [problem.values for problem in problems]
    ids = tuple(str(row["id"]) for row in values if isinstance(row, Mapping) and row.get("id") is not None)
    report = {
        "fastguard_generate": 2,
        "settings": dict(settings),
        "total": len(flags),
        "rejected": len(problems),
        "rejected_ids": list(ids[:LISTED]),
        **counts,
        "manifest": manifest.path.name,
    }
    images = [lines[request.id] for request in requests if request.id in lines] if small else None
    written = write_atomic(out / REPORT, _text(report, images))
    return Summary(len(flags), made, counts, len(problems), ids, written)


def _text(report: Mapping[str, Any], images: Sequence[Mapping[str, Any]] | None) -> str:
    """Indented JSON with a line an image: Python's encoder is ten times as slow where it indents."""
    head = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False).removesuffix("\n}")
    if not images:
        return f'{head},\n  "images": {json.dumps(images)}\n}}\n'
    rows = ",\n".join("    " + json.dumps(image, allow_nan=False, ensure_ascii=False) for image in images)
    return f'{head},\n  "images": [\n{rows}\n  ]\n}}\n'
