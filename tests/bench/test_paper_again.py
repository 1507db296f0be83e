"""`python -m bench paper` in a folder that it was in before: it goes on, adds, makes again what is gone, and refuses other settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.methods import Ren
from tests.bench.own_model import call, rows


def test_too_large_a_batch_and_on_with_a_smaller_one(
    given: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished results stay; the images are those of any batch size; the summary has both sizes."""
    generate = Ren.generate

    def short_of_memory(self: Ren, pipe: Any, request: Any) -> Any:
        if len(request.prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate(self, pipe, request)

    monkeypatch.setattr(Ren, "generate", short_of_memory)
    result = call(given, tmp_path)
    assert result.exit_code == 2 and "Traceback" not in result.output
    advice = "ren: out of memory with 4 images at once; finished results are kept: run the same command with a --batch-size below 4"
    assert advice in result.output and "Tried to allocate 2.00 GiB" in result.output
    first = rows(tmp_path)
    assert {r["method"] for r in first} == {"none", "cfg", "stp"}  # ren comes after them
    assert call(given, tmp_path, batch_size=2).exit_code == 0
    assert rows(tmp_path)[: len(first)] == first
    one, two = ({r["image"]: r for r in rows(out)} for out in (done, tmp_path))
    assert len(rows(tmp_path)) == len(two) and set(one) == set(two)
    for name in two:
        pair = [np.asarray(Image.open(out / name), int) for out in (done, tmp_path)]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    sizes = json.loads((tmp_path / "summary.json").read_text())["batch sizes"]
    assert sizes == {
        "none": [2, 8],
        "cfg": [2, 8],
        "stp": [2, 8],
        "ren": [2],
    }  # of what is in the tables  # the second scale came after ren's first
    assert "Batches of 2 and 8;" in (tmp_path / "tables.md").read_text()


def test_an_image_that_is_gone(given: Path, done: Path, tmp_path: Path) -> None:
    """Made again by the command that made it; named by one that does not make its method."""
    out = tmp_path / "out"
    shutil.copytree(done, out)
    lost = out / next(r["image"] for r in rows(out) if r["method"] == "ren" and r["scale"] == 7.5 and r["seed"] == 0)
    lost.unlink()
    result = call(given, out, methods="none")
    assert result.exit_code == 2 and f"are gone (1, the first {lost.relative_to(out)}): name these" in result.output
    result = call(given, out)
    assert result.exit_code == 0 and "1 of 64 images still to make" in result.output
    assert lost.read_bytes() == (done / lost.relative_to(out)).read_bytes()
    assert (out / "results.jsonl").read_bytes() == (done / "results.jsonl").read_bytes()


@pytest.mark.slow
def test_several_processes_make_what_one_makes(given: Path, done: Path, tmp_path: Path) -> None:
    """Each has fewer threads, so sums may round otherwise; everything else is the same, in the same order."""
    assert call(given, tmp_path, processes=2).exit_code == 0
    one, two = rows(done), rows(tmp_path)
    exact = ("unit", "unit_place", "method", "scale", "group", "id", "seed", "image", "rows", "copy", "finite")
    assert [[r[name] for name in exact] for r in two] == [[r[name] for name in exact] for r in one]
    for a, b in zip(one, two, strict=True):
        assert b["similarity_set"] == pytest.approx(a["similarity_set"], abs=1e-3)
        assert b["details"].get("transition_step") == a["details"].get("transition_step")
        pair = [np.asarray(Image.open(out / a["image"]), int) for out in (done, tmp_path)]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    before = (tmp_path / "results.jsonl").read_bytes()
    assert call(given, tmp_path, processes=3).exit_code == 0 and (tmp_path / "results.jsonl").read_bytes() == before


def test_stopped_by_hand(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ren, "generate", stop)
    result = call(given, tmp_path)
    assert result.exit_code == 130 and "the same command resumes" in result.output and "Traceback" not in result.output
    monkeypatch.undo()
    kept = rows(tmp_path)
    assert kept and call(given, tmp_path).exit_code == 0 and rows(tmp_path)[: len(kept)] == kept


def test_running_again_makes_nothing_and_methods_can_be_added(given: Path, done: Path) -> None:
    before = (done / "results.jsonl").read_bytes()
    (done / "images" / ".a.png.0.tmp").write_text("left by a kill")
    assert call(given, done, methods="none").exit_code == 0
    assert not list(done.rglob(".*.tmp"))
    assert (done / "results.jsonl").read_bytes() == before
    tables = json.loads((done / "summary.json").read_text())["tables"]["memorized"]
    assert set(tables) == {"none", "cfg", "stp", "ren"}  # those of the earlier run are still there


def test_seconds_are_measured_by_turns_and_kept(given: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "out")
    assert call(given, tmp_path / "out", seconds=2).exit_code == 0
    found = json.loads((tmp_path / "out/seconds.json").read_text())
    assert set(found) == {"none", "cfg", "stp", "ren"} and all(len(v) == 2 and min(v) > 0 for v in found.values())
    low, high = sorted(found["ren"])
    cell = json.loads((tmp_path / "out/summary.json").read_text())["tables"]["memorized"]["ren"]["seconds ratio"]
    assert cell["median"] == pytest.approx((low + high) / 2) and cell["pairs"] == 2


def test_a_folder_of_an_older_version_is_refused_with_the_key_that_it_lacks(
    given: Path, done: Path, tmp_path: Path
) -> None:
    kept = json.loads((done / "settings.json").read_text())
    assert {"scheduler", "vae"} <= set(kept["configurations"])
    del kept["configurations"]
    (tmp_path / "settings.json").write_text(json.dumps(kept))
    result = call(given, tmp_path)
    assert result.exit_code == 2 and "configurations: missing there" in result.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 4}, "steps: 3 there, 4 now"),
        ({"seeds": 3}, "seeds: 2 there, 3 now"),
        ({"ordinary": None}, "prompts: "),
    ],
)
def test_other_settings_into_the_same_folder_are_refused(given: Path, done: Path, changed: dict, message: str) -> None:
    before = (done / "results.jsonl").read_bytes()
    (done / ".draft.tmp").write_text("not ours to remove")
    result = call(given, done, **changed)
    assert result.exit_code == 2 and "holds results of other settings" in result.output and message in result.output
    assert (done / "results.jsonl").read_bytes() == before and (done / ".draft.tmp").exists()
