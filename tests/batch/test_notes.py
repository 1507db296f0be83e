"""What stock only logs is in the manifest, per image, and counted in the summary; what others read of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import json as arrow

from fastguard import generate
from fastguard.batch.cuts import cuts
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import read_record
from fastguard.batch.summary import CAUGHT, FRAME, LABEL, PLAIN, TILE
from fastguard.policies.presets import policy
from tests import pipelines
from tests.batch.jobs import OPTIONS, lines


def test_images_that_the_safety_checker_blacks(pipe, tmp_path, monkeypatch):
    def check(image, device, dtype):
        return image * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), [True, False]

    monkeypatch.setattr(pipe, "run_safety_checker", check, raising=False)
    summary = generate(pipe, ["a cat", "a dog"], tmp_path, **OPTIONS)
    assert {line["prompt"]: line["blacked"] for line in lines(tmp_path)} == {"a cat": True, "a dog": False}
    assert summary.blacked == 1
    assert "blacked by the safety checker: 1" in str(summary)
    assert not np.asarray(Image.open(tmp_path / "00000-0.png")).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_images_that_the_autoencoder_returns_as_nan(pipe, tmp_path, monkeypatch):
    stock = pipe.vae.decode

    def decode(latents, **options):
        image = stock(latents, **options)[0].clone()
        image[1, 0, 3, 3] = float("nan")
        return (image,)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    summary = generate(pipe, ["a cat", "a dog"], tmp_path, **OPTIONS)
    assert {line["prompt"]: line["vae_non_finite"] for line in lines(tmp_path)} == {"a cat": False, "a dog": True}
    assert summary.non_finite == 1
    assert json.loads(summary.report.read_text())["non_finite"] == 1


def test_prompts_that_are_cut(pipe, tmp_path):
    """The tokenizer has room for 16 tokens, of which a begin, an end and four for the first words: two rows, one picture, and both rows say so."""
    long = "a cat" + " b" * 10
    rows = [{"prompt": long}, {"prompt": long + " c d"}, {"prompt": long + " c e", "negative_prompt": long + " f"}]
    summary = generate(pipe, rows, tmp_path, **OPTIONS)
    pictures = [np.asarray(Image.open(tmp_path / f"0000{i}-0.png")).astype(int) for i in range(2)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    found = sorted(lines(tmp_path), key=lambda line: line["id"])
    assert [(line["prompt_cut"], line["negative_prompt_cut"]) for line in found] == [
        ("", ""), ("c d", ""), ("c e", "f"),
    ]  # fmt: skip
    assert summary.cut == 2
    assert "cut at the encoder's length: 2" in str(summary)


class Words:
    """A tokenizer of words, with an end as T5's has."""

    model_max_length = 512

    def __call__(self, texts, **options):
        return SimpleNamespace(input_ids=[[*text.split(), "</s>"] for text in texts])

    def decode(self, ids, **options):
        return " ".join(ids)


def test_the_encoder_that_reads_furthest_decides():
    """SD3's T5 reads 256 tokens (an argument of the call), whatever its tokenizer says; CLIP's 16 are its own."""
    pipe = pipelines.sd3()
    pipe.tokenizer_3 = Words()
    middle, long = " ".join("ab" * 50), " ".join(f"w{i}" for i in range(300))
    assert cuts(pipe, [middle, long, "short", None]) == {long: " ".join(f"w{i}" for i in range(255, 300))}
    pipe.tokenizer_3 = None
    assert cuts(pipe, [middle])[middle].replace(" ", "") == "ab" * 43  # 14 of 100 are read


def test_fields_of_the_manifest_have_one_type(pipe, tmp_path):
    """Policies whose `before` and scale are of different types, with and without a gate: pyarrow reads them as one table."""
    rows = [
        {"prompt": "a", "policy": policy("dtp", gate=1e-6), "negative_prompt": "b"},
        {"prompt": "a", "policy": policy("og+stp", before=-2.0)},
        {"prompt": "a", "policy": policy("dtp", guidance_scale=(3.0, 2.0))},
        {"prompt": "a", "policy": "cfg", "guidance_scale": 4},
        {"prompt": "a", "policy": "cfg", "guidance_scale": 1},
    ]
    generate(pipe, rows, tmp_path, **OPTIONS)
    table = arrow.read_json(tmp_path / "manifest.jsonl").to_pylist()
    found = {row["id"]: row for row in table}
    assert [found[f"0000{i}-0"]["guidance_scale"] for i in range(5)] == [7.5, 7.5, None, 4.0, 1.0]
    assert [found[f"0000{i}-0"]["policy"] for i in range(5)] == ["dtp", "og+stp", "dtp", "cfg", "cfg"]
    assert json.loads(found["00001-0"]["policy_json"])["before"] == -2.0


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("metadata", ["id", "none"])
def test_metadata(pipe, tmp_path, format, metadata):
    """Nothing of the prompt is in the file."""
    generate(pipe, ["secretword"], tmp_path, **OPTIONS, format=format, metadata=metadata)
    (line,) = lines(tmp_path)
    raw = (tmp_path / line["file"]).read_bytes()
    assert b"secretword" not in raw
    expected = {"id": line["id"], "request": line["request"]} if metadata == "id" else None
    assert read_record(tmp_path / line["file"]) == expected
    assert generate(pipe, ["secretword"], tmp_path, **OPTIONS, format=format, metadata=metadata).made == 0


def test_png_keys_are_ours_and_the_web_uis(pipe, tmp_path):
    """A chunk "prompt" is a graph in JSON to node editors."""
    generate(pipe, ["a, b: c"], tmp_path, **OPTIONS)
    with Image.open(tmp_path / "00000-0.png") as image:
        image.load()
        assert set(image.text) == {"parameters", "fastguard"}
        assert image.text["parameters"].startswith(
            "a, b: c\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 0, Size: 32x32"
        )
    with pytest.raises(ValueError, match="metadata='all'"):
        JobOptions(metadata="all")


@pytest.mark.parametrize("shard_size", [None, 2])
def test_sheet(pipe, tmp_path, shard_size):
    """A tile per image, in the order of the rows; the frame says what the guard says."""
    rows = [
        {"id": f"r{i}", "prompt": "a cat", "policy": p} for i, p in enumerate(["cfg", policy("dtp", gate=1e-6), "cfg"])
    ]
    generate(pipe, rows, tmp_path, **OPTIONS, shard_size=shard_size, sheet=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * TILE, TILE + LABEL)
        corners = ["#" + bytes(sheet.getpixel((i * TILE, 0))).hex() for i in range(3)]
        assert corners == [PLAIN, CAUGHT, PLAIN]
        if shard_size is None:
            small = Image.open(tmp_path / "r2.png").resize((TILE - 2 * FRAME, TILE - 2 * FRAME))
            tile = sheet.crop((2 * TILE + FRAME, FRAME, 3 * TILE - FRAME, TILE - FRAME))
            assert np.array_equal(np.asarray(tile), np.asarray(small))
