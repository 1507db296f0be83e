"""What can go wrong in a job, and what is left of it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastguard.batch import local, store
from fastguard.batch.task import Interrupted, generate
from fastguard.files import Growing, JsonLines
from fastguard.policies.presets import policy
from tests.batch.jobs import OPTIONS, ROWS, check_complete, lines, pixels, stamps

ROOT = Path(__file__).parents[2]


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


def test_gates_used_elsewhere_are_told_once_per_policy_and_steps(pipe, tmp_path, caplog):
    """Before an image is made, and not again by the guard that makes them."""
    for name, steps, gate in (("a", 2, 1e-6), ("b", 50, 1e-5)):
        policy("dtp", gate=gate).save(tmp_path / f"{name}.json", provenance={"steps": steps, "dtype": "float32"})
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    rows = [{"prompt": "a cat", "policy": name} for name in (*files, files[1])] + [
        {"prompt": "a dog", "policy": files[0], "steps": 3, "guidance_scale": scale} for scale in (2, 3)
    ]
    generate(pipe, rows, tmp_path / "out", **OPTIONS)
    told = [r.message.partition(" was calibrated with ")[2].partition(":")[0] for r in caplog.records]
    assert [text for text in told if text] == ["steps 50, not 2", "steps 2, not 3"]


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_halves_the_batch(pipe, tmp_path, monkeypatch, whole, message, caplog):
    kind = torch.OutOfMemoryError if "CUDA" in message else RuntimeError
    sizes = failing(pipe, monkeypatch, lambda sample: kind(message) if len(sample) > 4 else None)
    summary = generate(pipe, ROWS, tmp_path, **{**OPTIONS, "policy": "dtp", "batch_size": 8})
    assert summary.made == 10
    assert "going on with 2" in caplog.text
    assert sizes[0] == 16 and sizes[1] == 8 and set(sizes[2:]) == {4}  # two branches of 8, 4 and then 2 images
    assert sorted(line["id"] for line in lines(tmp_path)) == sorted(row["id"] for row in ROWS)


def test_out_of_memory_for_one_image(pipe, tmp_path, monkeypatch):
    failing(pipe, monkeypatch, lambda sample: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        generate(pipe, ROWS, tmp_path, **OPTIONS)
    assert lines(tmp_path) == []


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


@pytest.mark.parametrize("keep_going", [True, False], ids=["keeping going", "stopping"])
def test_image_that_cannot_be_decoded(pipe, tmp_path, monkeypatch, whole, keep_going):
    """Its batch mates are made all the same, with the records of their own places in the batch."""
    original, batches = pipe.vae.decode, []

    def decode(latents, **options):
        batches.append(latents)
        # The second image of the first batch, whether it comes with the others or alone.
        if any(torch.allclose(row, batches[0][1], atol=1e-3) for row in latents):
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
        left[0] = 3 if where == "shard" else 1  # an image, a group
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
    stock_encode, stock_write = local.encode, store.write_atomic

    def encode(image, record, options):
        if record["id"] == "r3":
            raise OSError("encoder error -2 when writing image file")  # as Pillow has it
        return stock_encode(image, record, options)

    def write(path, data):
        if path.name == "r3.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock_write(path, data)

    if kind == "encoder":
        monkeypatch.setattr(local, "encode", encode)
    else:
        monkeypatch.setattr(store, "write_atomic", write)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_in_good_order(pipe, tmp_path, whole, number, monkeypatch):
    add, sent = JsonLines.add, []

    def add_and_send(self, records):
        # In the middle of the run on every machine: a thread that polls may come too late, and then ends the tests.
        add(self, records)
        if not sent:
            sent.append(number)
            signal.raise_signal(number)

    before = signal.getsignal(number)
    monkeypatch.setattr(JsonLines, "add", add_and_send)
    with pytest.raises(Interrupted, match=number.name):
        generate(pipe, ROWS, tmp_path, **{**OPTIONS, "batch_size": 1, "steps": 2})
    assert signal.getsignal(number) is before
    assert 0 < len(lines(tmp_path)) < 10
    assert {line["id"] for line in lines(tmp_path)} == set(pixels(tmp_path))
    kept = stamps(tmp_path)
    generate(pipe, ROWS, tmp_path, **OPTIONS)
    assert kept.items() <= stamps(tmp_path).items()
    check_complete(tmp_path, whole)


@pytest.mark.slow
def test_killed_at_any_moment(model, tmp_path, whole):
    """SIGKILL, three times: no image is lost, damaged or made twice. (`python -m bench.batches` does it 20 times to 1,000 rows.)"""
    out = tmp_path / "out"
    program = (
        "import json, sys\nfrom fastguard.batch.task import generate\n"
        f"generate({model!r}, {ROWS!r}, {str(out)!r}, policy='stp', steps=2, batch_size=1, device='cpu', progress=False)"
    )
    known: dict[str, int] = {}
    for target in (1, 3, 5):
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
