"""The page of what a GPU measured says what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu_page

FOLDER = Path(__file__).parents[2] / "docs" / "gpu"


def test_the_committed_page_is_of_the_committed_files():
    assert gpu_page.page(FOLDER) == (FOLDER / "README.md").read_text(encoding="utf-8"), "run python -m bench.gpu_page"


def test_numbers_come_through(tmp_path):
    spread = {"median": 0.5, "q1": 0.4, "q3": 0.6}
    timed = {"ms": {"median": 30.0}, "ratio": spread, "rounds": 3, "difference": 0.001}
    rows = [
        {"how": "stock", **timed},
        {"how": "a", **timed, "graph_bytes": 2**31, "capture_seconds": 1.5},
        {"how": "b", "reason": "no room"},
        {"how": "c", "wrong": "differ"},
    ]
    where = {"size": "SDXL", "batch": 2, "steps": 10}
    write(
        tmp_path / "one.json",
        {"name": "captures", "outcome": "broken off", "reason": "late", "results": [{**where, **row} for row in rows]},
    )
    page = gpu_page.page(tmp_path)
    assert "| SDXL | 2 | 10 | a | 3.0 | 0.50 [0.40, 0.60] | 3 | 2.00 | 1.50 | 1.0e-03 |" in page
    assert "| b | no room |" in page and "| c | differ |" in page and "a thing (driver 1" in page
    assert "- `bench this`: captures broken off, late" in page
    gpu_page.plot(tmp_path)
    assert (tmp_path / "captures.png").stat().st_size > 1000


def test_files_of_two_devices_are_no_page(tmp_path):
    write(tmp_path / "one.json")
    write(tmp_path / "two.json", device="another thing")
    with pytest.raises(ValueError, match="differ in device"):
        gpu_page.page(tmp_path)
    with pytest.raises(ValueError, match="no JSON file"):
        gpu_page.page(tmp_path / "nowhere")


def write(path: Path, *benchmarks: dict, device: str = "a thing") -> None:
    head = {"name": device, "driver": "1", "cuda": "2"}
    versions = {"torch": "3", "triton": "4", "diffusers": "5"}
    file = {
        "command": ["bench", "this"],
        "device": head,
        "versions": versions,
        "tests": {"counts": {"passed": 1}},
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(file))
