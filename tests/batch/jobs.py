"""Ten rows, and what a whole job of them must have left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

OPTIONS = {"policy": "stp", "steps": 2, "batch_size": 4, "progress": False}
ROWS = [{"id": f"r{i}", "prompt": f"cat {i % 5}", "seed": i} for i in range(10)]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("r*.png"))}


def stamps(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("r*.png")}


def check_complete(out: Path, whole: Path, rows=ROWS) -> None:
    """Each id once, each image what it is in an undisturbed run, nothing else left."""
    ids = [line["id"] for line in lines(out)]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    expected, found = pixels(whole), pixels(out)
    assert found.keys() == expected.keys()
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= 1
    assert not list(out.glob(".*.tmp"))
    assert (out / "report.json").exists()
