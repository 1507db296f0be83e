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


def test_the_anchored_op_and_an_own_combination_family_stand_there(tmp_path):
    def timed(ms):
        return {"ms": {"median": ms}, "ratio": {"median": ms / 8, "q1": ms / 10, "q3": ms / 5}, "rounds": 4}

    works = {"stock": timed(8.0), "fused": timed(2.0), "fused, anchored": timed(4.0)}
    step = {"latents": [1, 4, 64, 64], "launches_per_step": 1, "steps": 20, "eager": works, "graph": works}
    video = {"height": 480, "width": 832, "num_frames": 17, "steps": 6, "difference": 0.0}
    times = {"stock": timed(60.0), "guarded, plain guidance": timed(66.0), "guarded, anchored": timed(72.0)}
    write(
        tmp_path / "one.json",
        {"name": "guided_step", "outcome": "ran", "results": [{**step, "bytes_per_second": 4.2e10}]},
        {"name": "own_combination", "outcome": "ran", "results": [{**video, "times": times}]},
    )
    page = gpu_page.page(tmp_path)
    assert "| 1 x 4 x 64 x 64 | 1 | 400, 100 | 0.25 [0.20, 0.40] | 400, 100 | 0.25 [0.20, 0.40] | 42 |" in page
    assert (
        "| 1 x 4 x 64 x 64, all anchored | 1 | 400, 200 | 0.50 [0.40, 0.80] | 400, 200 | 0.50 [0.40, 0.80] | - |"
        in page
    )
    assert "| 17 x 480 x 832 | guarded, plain guidance | 11.0 | 8.25 [6.60, 13.20] | 4 | 0.0e+00 |" in page
    assert "| 17 x 480 x 832 | guarded, anchored | 12.0 | 9.00 [7.20, 14.40] | 4 |  |" in page


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
