"""Whole jobs on a tiny pipeline: what is written, and that nothing is lost, damaged or made twice however a run ends."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from fastguard.batch import store
from fastguard.batch.growing import Growing
from fastguard.batch.pictures import Picture, read_record
from fastguard.batch.stages import Stages
from fastguard.generate import BadRows, Interrupted, generate, prepare
from fastguard.policy import Policy, policy

ROOT = Path(__file__).parents[2]
OPTIONS = {"policy": "stp", "steps": 2, "batch_size": 4, "progress": False}
ROWS = [{"id": f"r{i}", "prompt": f"cat {i % 5}", "seed": i} for i in range(10)]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("r*.png"))}


def stamps(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("r*.png")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    from tests import pipelines

    out = tmp_path_factory.mktemp("whole") / "out"
    generate(pipelines.sd(), ROWS, out, **OPTIONS)
    return out


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def overlap(request, monkeypatch):
    """Text and decoding in the caller's thread or beside the loop, whatever this machine would choose."""
    monkeypatch.setattr(Stages, "overlap", request.param)
    return request.param


def check_complete(out: Path, whole: Path, rows=ROWS) -> None:
    """Each id once, each image what it is in an undisturbed run, nothing else left."""
    ids = [line["id"] for line in lines(out)]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    expected, found = pixels(whole), pixels(out)
    assert found.keys() == expected.keys()
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) <= 1
    assert not list(out.glob(".*.tmp"))
    assert (out / "report.json").exists()


# What is written ---------------------------------------------------------------------------------------------------------


def test_manifest_and_report(whole):
    found = lines(whole)
    assert sorted(line["id"] for line in found) == sorted(row["id"] for row in ROWS)
    line = next(line for line in found if line["id"] == "r7")
    assert (line["prompt"], line["seed"], line["steps"], line["file"]) == ("cat 2", 7, 2, "r7.png")
    assert Policy.from_dict(line["policy"]) == policy("stp")
    assert line["transition_step"] == 1
    assert line["d_curve"][0] is None  # the conditional branch did not run
    assert line["d_curve"][1] > 0
    assert line["seconds"] > 0
    assert line["versions"]["torch"] == torch.__version__
    assert line["bytes"] == (whole / "r7.png").stat().st_size
    report = json.loads((whole / "report.json").read_text())
    assert [image["id"] for image in report["images"]] == [row["id"] for row in ROWS]
    assert (report["total"], report["transitions"], report["rejected"]) == (10, 10, 0)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_record_is_in_the_image(pipe, tmp_path, format):
    row = {"id": "x", "prompt": "caf\u00e9 \u263a", "negative_prompt": "ugly"}
    generate(pipe, [row], tmp_path, policy="dtp", steps=3, format=format, progress=False)
    (line,) = lines(tmp_path)
    path = tmp_path / line["file"]
    assert path.suffix == {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[format]
    with Image.open(path) as image:
        assert image.format.lower() == format
        assert image.size == (32, 32)
    record = read_record(path)
    assert record == {key: value for key, value in line.items() if key not in ("file", "bytes", "mtime_ns", "sha256")}
    assert record["prompt"] == "caf\u00e9 \u263a"
    if format == "png":
        with Image.open(path) as image:
            image.load()
            assert image.text["policy"] == "dtp"
            assert image.text["transition"].startswith(("transition at row", "forced at row", "no transition"))


def test_jpeg_whose_record_is_too_long():
    image = Image.new("RGB", (8, 8))
    record = {"id": "x", "request": "y", "prompt": "p", "d_curve": [1.0] * 50_000}
    found = read_record(io.BytesIO(Picture("jpeg").encode(image, record)))
    assert found == {"id": "x", "request": "y", "prompt": "p"}
    found = read_record(io.BytesIO(Picture("jpeg").encode(image, record | {"prompt": "p" * 70_000})))
    assert found == {"id": "x", "request": "y"}
    assert read_record(io.BytesIO(Picture("webp").encode(image, record))) == record


def test_webdataset_shards(pipe, tmp_path, whole):
    """Read back by the webdataset package; the manifest's offsets point at the samples."""
    generate(pipe, ROWS, tmp_path, **OPTIONS, shard_size=4)
    shards = sorted(tmp_path.glob("*.tar"))
    assert [shard.name for shard in shards] == [f"shard-00000{i}.tar" for i in range(3)]
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("pil"))
    assert sorted(sample["__key__"] for sample in samples) == sorted(row["id"] for row in ROWS)
    expected = pixels(whole)
    for sample in samples:
        assert np.array_equal(np.asarray(sample["png"]), expected[sample["__key__"]])
        assert sample["json"]["id"] == sample["__key__"]
    for line in lines(tmp_path):
        raw = (tmp_path / line["file"]).read_bytes()[line["offset"] : line["offset"] + line["bytes"]]
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            assert tar.getnames() == [f"{line['id']}.png", f"{line['id']}.json"]


def test_long_ids_fit(pipe, tmp_path):
    row = {"id": "x" * 200, "prompt": "a cat"}
    generate(pipe, [row], tmp_path / "files", **OPTIONS)
    assert (tmp_path / "files" / ("x" * 200 + ".png")).exists()
    generate(pipe, [row], tmp_path / "shards", **OPTIONS, shard_size=4)
    (sample,) = webdataset.WebDataset(str(tmp_path / "shards" / "shard-000000.tar"), shardshuffle=False)
    assert sample["__key__"] == "x" * 200


# Going on ------------------------------------------------------------------------------------------------------------------


def test_finished_job_loads_no_model(model, tmp_path, monkeypatch):
    options = {**OPTIONS, "device": "cpu"}
    assert generate(model, ROWS[:4], tmp_path / "out", **options).made == 4
    (tmp_path / "out" / "report.json").unlink()
    monkeypatch.setattr("fastguard.models.load_pipeline", None)
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
    first, second, third, _ = sorted(tmp_path.glob("*.tar"))
    before = {line["id"]: line for line in lines(tmp_path)}
    of = {shard: [line for line in before.values() if line["file"] == shard.name] for shard in (first, second, third)}
    flipped, torn = of[first][1], of[second][2]
    raw = bytearray(first.read_bytes())
    raw[flipped["offset"] + 5] ^= 1  # of a name in the tar itself
    first.write_bytes(raw)
    second.write_bytes(second.read_bytes()[: torn["offset"] + torn["bytes"] - 512])
    third.unlink()
    lost = {flipped["id"], torn["id"], *(line["id"] for line in of[third])}

    assert generate(pipe, ROWS, tmp_path, **options).made == len(lost)
    after = {line["id"]: line for line in lines(tmp_path)}
    assert {id for id in before if before[id] != after[id]} == lost
    assert generate(pipe, ROWS, tmp_path, **options).made == 0
    shards = [str(shard) for shard in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert sorted(sample["__key__"] for sample in samples) == sorted(row["id"] for row in ROWS)
    expected = pixels(whole)
    assert max(np.abs(np.asarray(s["png"]).astype(int) - expected[s["__key__"]]).max() for s in samples) <= 1
    for shard in shards:
        with tarfile.open(shard) as tar:
            assert all(tar.extractfile(member).read() for member in tar.getmembers())


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
    monkeypatch.setattr("fastguard.batch.job.ignores_case", lambda out: True)
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


# What can go wrong -----------------------------------------------------------------------------------------------------


def failing(pipe, monkeypatch, fail):
    """Have the UNet raise what `fail(rows)` returns; the sizes that it was called with."""
    sizes: list[int] = []
    stock = type(pipe.unet).forward

    def forward(self, sample, *args, **kwargs):
        sizes.append(len(sample))
        if error := fail(sample):
            raise error
        return stock(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", forward)
    return sizes


def test_ungated_policies_are_told_once(pipe, tmp_path, caplog):
    rows = [{"prompt": "a cat", "policy": name} for name in ("stp", "dtp", "cfg", "stp")]
    generate(pipe, rows, tmp_path / "out", **OPTIONS)
    assert [r.message.split(" has no gate")[0] for r in caplog.records] == ["policy 'stp', 'dtp'"]


def test_where_the_stages_run(pipe, tmp_path, monkeypatch, overlap, whole):
    threads = {}
    for name in ("encode", "denoise", "decode"):
        original = getattr(Stages, name)

        def noted(self, *args, name=name, original=original):
            threads.setdefault(name, set()).add(threading.current_thread())
            return original(self, *args)

        monkeypatch.setattr(Stages, name, noted)
    generate(pipe, ROWS, tmp_path / "out", **OPTIONS)
    here = {threading.current_thread()}
    assert threads["denoise"] == here
    assert (threads["encode"] == here, threads["decode"] == here) == (not overlap, not overlap)
    check_complete(tmp_path / "out", whole)


def test_when_the_stages_overlap(pipe, monkeypatch):
    monkeypatch.setattr("fastguard.batch.stages._cores", lambda: 2)
    stages = Stages(pipe, [], {})
    try:
        for threads, device, expected in ((1, "cpu", True), (2, "cpu", False), (2, "cuda", True)):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            stages.device = torch.device(device)
            assert stages.overlap is expected
    finally:
        stages.close()


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_halves_the_batch(pipe, tmp_path, monkeypatch, whole, message, caplog):
    kind = torch.OutOfMemoryError if "CUDA" in message else RuntimeError
    sizes = failing(pipe, monkeypatch, lambda sample: kind(message) if len(sample) > 4 else None)
    summary = generate(pipe, ROWS, tmp_path, **{**OPTIONS, "policy": "dtp", "batch_size": 8})
    assert summary.made == 10
    assert "going on with 2" in caplog.text
    assert sizes[0] == 16 and sizes[1] == 8 and set(sizes[2:]) == {4}  # two branches of 8, 4 and then 2 images
    assert sorted(line["id"] for line in lines(tmp_path)) == sorted(row["id"] for row in ROWS)


@pytest.mark.usefixtures("overlap")
def test_out_of_memory_for_one_image(pipe, tmp_path, monkeypatch):
    failing(pipe, monkeypatch, lambda sample: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        generate(pipe, ROWS, tmp_path, **OPTIONS)
    assert lines(tmp_path) == []


@pytest.mark.usefixtures("overlap")
def test_failing_image_is_left_out_when_keeping_going(pipe, tmp_path, monkeypatch, whole):
    """One row breaks the model: its batch mates are made, it is in rejected.jsonl with the bad rows."""
    poison = [0]

    def fail(sample):
        poison[0] += 1
        return ValueError("broken") if poison[0] in (1, 2) else None  # the first batch, then its first image alone

    failing(pipe, monkeypatch, fail)
    rows = [*ROWS, {"id": "bad", "prompt": ""}]
    summary = generate(pipe, rows, tmp_path, **OPTIONS, keep_going=True)
    assert (summary.total, summary.rejected) == (9, 2)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["error"]) for r in rejected] == [
        (11, "prompt='': must be text that is not empty"),
        (1, "ValueError: broken"),
    ]
    assert rejected[0]["row"] == {"id": "bad", "prompt": ""}
    monkeypatch.undo()
    assert generate(pipe, ROWS, tmp_path, **OPTIONS).made == 1
    assert not (tmp_path / "rejected.jsonl").exists()
    check_complete(tmp_path, whole)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("keep_going", [True, False], ids=["keeping going", "stopping"])
def test_image_that_cannot_be_decoded(pipe, tmp_path, monkeypatch, whole, keep_going):
    """Its batch mates are made all the same, with the records of their own places in the batch."""
    original, batches = pipe.vae.decode, []

    def decode(latents, **options):
        batches.append(latents)
        # The second image of the first batch, whether it comes with the others or alone.
        if any(torch.equal(row, batches[0][1]) for row in latents):
            raise ValueError("broken")
        return original(latents, **options)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    if not keep_going:
        with pytest.raises(ValueError, match="broken"):
            generate(pipe, ROWS, tmp_path, **OPTIONS)
        return
    assert generate(pipe, ROWS, tmp_path, **OPTIONS, keep_going=True).rejected == 1
    (rejected,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert rejected["error"] == "ValueError: broken"
    assert [len(latents) for latents in batches[:5]] == [4, 1, 1, 1, 1]
    assert {rejected["row"]["id"], *(line["id"] for line in lines(tmp_path))} == {row["id"] for row in ROWS}
    monkeypatch.undo()
    assert generate(pipe, ROWS, tmp_path, **OPTIONS).made == 1
    check_complete(tmp_path, whole)


def test_rejected_rows_that_are_no_json(pipe, tmp_path):
    deep: list = []
    for _ in range(900):
        deep = [deep]
    rows = ["a cat", {"prompt": "a", "seed": deep}, {"prompt": "a", ("b",): 1}, {"prompt": "a", "seed": 10**5000}]
    assert generate(pipe, rows, tmp_path, **OPTIONS, keep_going=True).rejected == 3
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [r["line"] for r in rejected] == [2, 3, 4]
    assert all(isinstance(r["row"], str) and len(r["row"]) <= 60 for r in rejected)


@pytest.mark.usefixtures("overlap")
def test_error_keeps_what_was_finished(pipe, tmp_path, monkeypatch, whole):
    calls = [0]

    def fail(sample):
        calls[0] += 1
        return ValueError("broken") if calls[0] == 6 else None  # the third batch's second step

    failing(pipe, monkeypatch, fail)
    with pytest.raises(ValueError, match="broken"):
        generate(pipe, ROWS, tmp_path, **OPTIONS)
    assert len(lines(tmp_path)) == 8
    monkeypatch.undo()
    assert generate(pipe, ROWS, tmp_path, **OPTIONS).made == 2
    check_complete(tmp_path, whole)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("where", ["image", "manifest", "shard"])
def test_disk_full(pipe, tmp_path, monkeypatch, whole, where):
    """Nothing half written stays, what was reported is there, and the same call goes on once there is room."""
    left = [3]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def spend():
        left[0] -= 1
        if left[0] < 0:
            raise full

    stock_write, stock_append = store.write_atomic, Growing.append

    def write(path, data):
        spend()
        stock_write(path, data)

    def append(self, data):
        if (where == "manifest") == (self._file.name is not None and data.startswith(b"{")):
            spend()
        return stock_append(self, data)

    if where == "image":
        monkeypatch.setattr(store, "write_atomic", write)
    else:
        left[0] = 1
        monkeypatch.setattr(Growing, "append", append)
    options = {**OPTIONS, "batch_size": 2, **({"shard_size": 4} if where == "shard" else {})}
    with pytest.raises(OSError, match="No space left"):
        generate(pipe, ROWS, tmp_path, **options)
    monkeypatch.undo()
    done = {line["id"] for line in lines(tmp_path)}
    assert 0 < len(done) < 10
    assert not list(tmp_path.glob(".*.tmp"))
    summary = generate(pipe, ROWS, tmp_path, **options)
    assert summary.total == 10 and summary.made <= 10 - len(done)
    assert sorted(line["id"] for line in lines(tmp_path)) == sorted(row["id"] for row in ROWS)
    if where != "shard":
        check_complete(tmp_path, whole)


def unwritable(out: Path, monkeypatch, kind: str) -> None:
    """Have r3 fail on its way to the disk."""
    if kind == "directory":
        (out / "r3.png").mkdir()
        return
    stock_encode, stock_write = Picture.encode, store.write_atomic

    def encode(self, image, record):
        if record["id"] == "r3":
            raise OSError("encoder error -2 when writing image file")  # as Pillow has it
        return stock_encode(self, image, record)

    def write(path, data):
        if path.name == "r3.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock_write(path, data)

    if kind == "encoder":
        monkeypatch.setattr(Picture, "encode", encode)
    else:
        monkeypatch.setattr(store, "write_atomic", write)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("keep_going", [True, False], ids=["keeping going", "stopping"])
@pytest.mark.parametrize("kind", ["directory", "encoder", "disk"])
def test_picture_that_cannot_be_written(pipe, tmp_path, monkeypatch, whole, kind, keep_going):
    """Keeping going, one that fails by itself is left out. A full disk ends the run: every other picture would fail too."""
    options = {**OPTIONS, "batch_size": 2, "keep_going": keep_going}
    generate(pipe, ROWS[:1], tmp_path, **options)
    unwritable(tmp_path, monkeypatch, kind)
    if kind == "disk" or not keep_going:
        with pytest.raises(OSError, match=r"No space left|directory|encoder error"):
            generate(pipe, ROWS, tmp_path, **options)
        assert not (tmp_path / "rejected.jsonl").exists()
        assert "r2" in {line["id"] for line in lines(tmp_path)}  # of the same batch
    else:
        summary = generate(pipe, ROWS, tmp_path, **options)
        assert (summary.total, summary.made, summary.rejected) == (9, 8, 1)
        (rejected,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
        assert (rejected["line"], rejected["row"]["id"]) == (4, "r3")
        assert rejected["error"].startswith(("IsADirectoryError: ", "OSError: encoder error -2"))
    monkeypatch.undo()
    if kind == "directory":
        (tmp_path / "r3.png").rmdir()
    generate(pipe, ROWS, tmp_path, **options)
    assert not (tmp_path / "rejected.jsonl").exists()
    check_complete(tmp_path, whole)


@pytest.mark.usefixtures("overlap")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_in_good_order(pipe, tmp_path, whole, number):
    def send():
        while not (tmp_path / "manifest.jsonl").exists() or not (tmp_path / "manifest.jsonl").stat().st_size:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(Interrupted, match=number.name):
        generate(pipe, ROWS, tmp_path, **{**OPTIONS, "batch_size": 1, "steps": 2})
    thread.join()
    assert signal.getsignal(number) is before
    assert 0 < len(lines(tmp_path)) < 10
    assert {line["id"] for line in lines(tmp_path)} == set(pixels(tmp_path))
    kept = stamps(tmp_path)
    generate(pipe, ROWS, tmp_path, **OPTIONS)
    assert kept.items() <= stamps(tmp_path).items()
    check_complete(tmp_path, whole)


def test_killed_at_any_moment(model, tmp_path, whole):
    """SIGKILL, three times: no image is lost, damaged or made twice. (`python -m bench.batches` does it 20 times to 1,000 rows.)"""
    out = tmp_path / "out"
    program = (
        "import json, sys\nfrom fastguard.generate import generate\n"
        f"generate({model!r}, {ROWS!r}, {str(out)!r}, policy='stp', steps=2, batch_size=1, device='cpu', progress=False)"
    )
    known: dict[str, int] = {}
    for target in (1, 4, 7):
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end and len(stamps(out)) < target:
            time.sleep(0.001)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert known.items() <= stamps(out).items()  # what was finished was left alone
        known = stamps(out)
        for line in (out / "manifest.jsonl").read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                assert json.loads(line)["id"] in known
    generate(model, ROWS, out, **{**OPTIONS, "batch_size": 1, "device": "cpu"})
    assert known.items() <= stamps(out).items()
    check_complete(out, whole)
