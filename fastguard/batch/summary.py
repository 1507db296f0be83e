"""report.json: what a finished job made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard.batch.manifest import Manifest
from fastguard.batch.request import Request
from fastguard.batch.tables import Problem
from fastguard.files import write_atomic

REPORT = "report.json"
LISTED = 10_000  # images that report.json lists; beyond, the manifest is the list


@dataclass(frozen=True)
class Summary:
    """total: images of the job that are there; made: of them by this run; rejected: rows that could not be made."""

    total: int
    made: int
    rejected: int
    caught: int
    transitions: int
    forced: int
    report: Path

    def __str__(self) -> str:
        text = (
            f"{self.total} images, {self.made} of them made now; caught by the gate: {self.caught}, transitions: "
            f"{self.transitions}, of them forced by the deadline: {self.forced}"
        )
        return f"{text}; rejected rows: {self.rejected}" if self.rejected else text


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
    for line in manifest.lines():
        if line["id"] in wanted:
            lines[line["id"]] = line if small else {key: line[key] for key in ("gate", "transition_step", "forced")}
    counts = {
        "total": len(lines),
        "rejected": len(problems),
        "caught": sum(1 for line in lines.values() if line["gate"] and line["gate"]["caught"]),
        "transitions": sum(1 for line in lines.values() if line["transition_step"] is not None),
        "forced": sum(1 for line in lines.values() if line["forced"]),
    }
    report = {
        "fastguard_generate": 1,
        "settings": dict(settings),
        **counts,
        "manifest": manifest.path.name,
    }
    images = [lines[request.id] for request in requests if request.id in lines] if small else None
    return Summary(made=made, report=write_atomic(out / REPORT, _text(report, images)), **counts)


def _text(report: Mapping[str, Any], images: Sequence[Mapping[str, Any]] | None) -> str:
    """Indented JSON with a line an image: Python's encoder is ten times as slow where it indents."""
    head = json.dumps(report, indent=2, allow_nan=False, ensure_ascii=False).removesuffix("\n}")
    if not images:
        return f'{head},\n  "images": {json.dumps(images)}\n}}\n'
    rows = ",\n".join("    " + json.dumps(image, allow_nan=False, ensure_ascii=False) for image in images)
    return f'{head},\n  "images": [\n{rows}\n  ]\n}}\n'
