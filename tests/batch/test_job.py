"""Whole jobs on a tiny pipeline: what is written."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import encode, read_record
from fastguard.batch.task import generate
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests.batch.jobs import OPTIONS, ROWS, lines, pixels

ROOT = Path(__file__).parents[2]


def test_manifest_and_report(whole):
    found = lines(whole)
    assert sorted(line["id"] for line in found) == sorted(row["id"] for row in ROWS)
    line = next(line for line in found if line["id"] == "r7")
    assert (line["prompt"], line["seed"], line["steps"], line["file"]) == ("cat 2", 7, 2, "r7.png")
    assert line["policy"] == "stp"
    assert Policy.from_dict(json.loads(line["policy_json"])) == policy("stp")
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
            assert set(image.text) == {"parameters", "fastguard"}
            first, negative, rest = image.text["parameters"].split("\n")
            assert (first, negative) == ("caf\u00e9 \u263a", "Negative prompt: ugly")
            assert rest.startswith("Steps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 32x32, Model: ")
            assert "Guard: dtp, Guard transition: " in rest


def test_jpeg_whose_record_is_too_long():
    image = Image.new("RGB", (8, 8))
    record = {"id": "x", "request": "y", "prompt": "p", "d_curve": [1.0] * 50_000}
    jpeg, webp = (JobOptions(format=name) for name in ("jpeg", "webp"))
    found = read_record(io.BytesIO(encode(image, record, jpeg)))
    assert found == {"id": "x", "request": "y", "prompt": "p"}
    found = read_record(io.BytesIO(encode(image, record | {"prompt": "p" * 70_000}, jpeg)))
    assert found == {"id": "x", "request": "y"}
    assert read_record(io.BytesIO(encode(image, record, webp))) == record


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
