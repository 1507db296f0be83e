"""A job that was interrupted or is called again: nothing is lost, damaged or made twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fastguard.batch.task import BadRows, generate, prepare
from tests.batch.jobs import OPTIONS, ROWS, check_complete, lines, pixels, stamps

ROOT = Path(__file__).parents[2]


def test_finished_job_loads_no_model(model, tmp_path, monkeypatch):
    options = {**OPTIONS, "device": "cpu"}
    assert generate(model, ROWS[:4], tmp_path / "out", **options).made == 4
    (tmp_path / "out" / "report.json").unlink()
    monkeypatch.setattr("fastguard.pipelines.loading.load_pipeline", None)
    summary = generate(model, ROWS[:4], tmp_path / "out", **options)
    assert (summary.total, summary.made) == (4, 0)
    assert summary.report.exists()


def test_more_rows_can_follow(pipe, tmp_path, whole):
    generate(pipe, ROWS[:5], tmp_path, **OPTIONS)
    before = stamps(tmp_path)
    assert generate(pipe, ROWS, tmp_path, **OPTIONS).made == 5
    assert before.items() <= stamps(tmp_path).items()
    check_complete(tmp_path, whole)


def test_what_a_crash_can_leave(pipe, tmp_path, whole):
    """A torn last line, an image that is not listed, one that is gone, one that is damaged, half a file."""
    generate(pipe, ROWS, tmp_path, **OPTIONS)
    before = stamps(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    kept = [line for line in manifest.read_bytes().splitlines(keepends=True) if b'"id": "r3"' not in line]
    manifest.write_bytes(b"".join(kept[:-1]) + kept[-1][:50])
    torn = json.loads(kept[-1])["id"]
    gone, damaged = [json.loads(line)["id"] for line in kept[:2]]
    (tmp_path / f"{gone}.png").unlink()
    raw = bytearray((tmp_path / f"{damaged}.png").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / f"{damaged}.png").write_bytes(raw)
    (tmp_path / ".r9.png.tmp").write_bytes(b"half")
    (tmp_path / "report.json").unlink()

    summary = generate(pipe, ROWS, tmp_path, **OPTIONS)
    assert summary.made == 2
    after = stamps(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {gone, damaged}
    assert after["r3"] == before["r3"] and after[torn] == before[torn]  # taken as they were
    assert len(lines(tmp_path)) == 12  # the two that were made again are listed again
    latest = {line["id"]: line for line in lines(tmp_path)}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in latest.values()))
    check_complete(tmp_path, whole)


def test_crash_within_a_shard(pipe, tmp_path, whole):
    """What the manifest does not list is cut off; what it lists stays byte for byte."""
    generate(pipe, ROWS, tmp_path, **OPTIONS, shard_size=4)
    manifest = tmp_path / "manifest.jsonl"
    kept = manifest.read_bytes().splitlines(keepends=True)[:6]
    manifest.write_bytes(b"".join(kept) + b'{"id": "r')
    first = (tmp_path / "shard-000000.tar").read_bytes()
    end = json.loads(kept[-1])["offset"] + json.loads(kept[-1])["bytes"]
    second = (tmp_path / "shard-000001.tar").read_bytes()[:end]
    assert generate(pipe, ROWS, tmp_path, **OPTIONS, shard_size=4).made == 4
    assert (tmp_path / "shard-000000.tar").read_bytes() == first
    assert (tmp_path / "shard-000001.tar").read_bytes()[:end] == second
    samples = list(
        webdataset.WebDataset([str(s) for s in sorted(tmp_path.glob("*.tar"))], shardshuffle=False).decode("pil")
    )
    assert sorted(sample["__key__"] for sample in samples) == sorted(row["id"] for row in ROWS)
    expected = pixels(whole)
    assert max(np.abs(np.asarray(s["png"]).astype(int) - expected[s["__key__"]]).max() for s in samples) <= 1


def test_damaged_shards(pipe, tmp_path, whole):
    """A flipped bit, a shard that ends too early and one that is gone: their samples, and no others, are made again."""
    options = {**OPTIONS, "shard_size": 3}
    generate(pipe, ROWS, tmp_path, **options)
    first, second, third, fourth = sorted(tmp_path.glob("*.tar"))
    before, kept = {line["id"]: line for line in lines(tmp_path)}, fourth.read_bytes()[:-1024]
    flipped, torn = (next(line for line in before.values() if line["file"] == s.name) for s in (first, second))
    raw = bytearray(first.read_bytes())
    raw[flipped["offset"] + 5] ^= 1  # of a name in the tar itself
    first.write_bytes(raw)
    second.write_bytes(second.read_bytes()[: torn["offset"] + torn["bytes"] - 512])
    third.unlink()
    lost = {line["id"] for line in before.values() if line["file"] != fourth.name}

    assert generate(pipe, ROWS, tmp_path, **options).made == len(lost) == 9
    after = {line["id"]: line for line in lines(tmp_path)}
    assert {id for id in before if before[id] != after[id]} == lost
    assert generate(pipe, ROWS, tmp_path, **options).made == 0
    assert fourth.read_bytes().startswith(kept)
    assert {path.name for path in tmp_path.glob("*.damaged")} == {f"{s.stem}.damaged" for s in (first, second)}
    samples = list(
        webdataset.WebDataset([str(s) for s in sorted(tmp_path.glob("*.tar"))], shardshuffle=False).decode("pil")
    )
    assert sorted(sample["__key__"] for sample in samples) == sorted(row["id"] for row in ROWS)
    expected = pixels(whole)
    assert max(np.abs(np.asarray(s["png"]).astype(int) - expected[s["__key__"]]).max() for s in samples) <= 1


def test_other_values_under_the_same_id_are_refused(pipe, tmp_path):
    generate(pipe, ROWS[:2], tmp_path, **OPTIONS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rows = [ROWS[0], ROWS[1] | {"prompt": "a dog"}]
    with pytest.raises(BadRows, match=r"row 2: id='r1': was made in .* prompt is \"cat 1\" there, \"a dog\" here"):
        generate(pipe, rows, tmp_path, **OPTIONS)
    with pytest.raises(BadRows, match="steps is 2 there, 3 here"):
        generate(pipe, ROWS[:2], tmp_path, **{**OPTIONS, "steps": 3})
    with pytest.raises(ValueError, match='format is "png" there, "webp" here'):
        generate(pipe, ROWS[:2], tmp_path, **OPTIONS, format="webp")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_directories_that_ignore_case(pipe, tmp_path, monkeypatch):
    rows = [{"id": "a", "prompt": "x"}, {"id": "A", "prompt": "y"}]
    prepare(pipe, rows, tmp_path, policy="cfg")
    monkeypatch.setattr("fastguard.batch.store.ignores_case", lambda out: True)
    with pytest.raises(BadRows, match="row 2: id='A': is the same file as id='a' here"):
        prepare(pipe, rows, tmp_path, policy="cfg")
    prepare(pipe, rows, tmp_path, policy="cfg", shard_size=9)


def test_long_jobs_are_summarized_without_a_list(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("fastguard.batch.summary.LISTED", 3)
    summary = generate(pipe, ROWS[:4], tmp_path, **OPTIONS)
    report = json.loads(summary.report.read_text())
    assert (report["images"], report["total"], report["transitions"]) == (None, 4, 4)


def test_damaged_manifest_is_told(pipe, tmp_path):
    generate(pipe, ROWS[:4], tmp_path, **OPTIONS)
    manifest = tmp_path / "manifest.jsonl"
    all_lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(all_lines[0] + "nonsense\n" + "".join(all_lines[1:]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        generate(pipe, ROWS[:4], tmp_path, **OPTIONS)


def test_one_process_at_a_time(pipe, tmp_path):
    with (
        prepare(pipe, ROWS[:1], tmp_path, policy="cfg").open(),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        prepare(pipe, ROWS[:1], tmp_path, policy="cfg")
