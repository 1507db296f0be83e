"""The embedded model, few steps, paired seeds; and as somebody's own model, with a finished run on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastguard import testbed
from tests.bench.own_model import Pooled, call


@pytest.fixture(scope="session")
def pipe():
    return testbed.load()


@pytest.fixture
def generate(pipe):
    """A method on the embedded model; fresh generators, seeded 0, 1, ..., for every call."""

    def run(method, prompts, steps=5, scale=7.5, seeds=None):
        seeds = range(len(prompts)) if seeds is None else seeds
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return method(pipe, prompts, generators, num_inference_steps=steps, guidance_scale=scale)

    return run


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two memorized and three ordinary prompts of the embedded model, as a user would bring them."""
    root = tmp_path_factory.mktemp("given")
    memorized, ordinary = testbed.prompts("memorized", "test")[:2], testbed.prompts("ordinary", "test")[:3]
    (root / "train").mkdir()
    with (root / "prompts.jsonl").open("w") as file:
        for number, p in enumerate(memorized):
            Image.fromarray(testbed.training_images()[p.index]).save(root / "train" / f"{number}_0.png")
            file.write(json.dumps({"caption": p.prompt, "index": number, "url": ""}) + "\n")
    Image.new("RGB", (32, 32)).save(root / "train" / "other.png")
    (root / "one").mkdir()
    Image.new("RGB", (32, 32)).save(root / "one" / "alone.png")
    (root / "ordinary.jsonl").write_text("".join(json.dumps({"caption": p.prompt}) + "\n" for p in ordinary))
    torch.jit.script(Pooled()).save(str(root / "sscd.pt"))
    return root


@pytest.fixture(scope="module")
def done(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, one a file of tests: they may run the command in it again, as long as its rows stay."""
    out = tmp_path_factory.mktemp("out")
    (out / ".draft.tmp").write_text("was there before")
    result = call(given, out)
    assert result.exit_code == 0, result.output
    assert (
        "64 of 64 images still to make, about 424 rows of the denoiser at most; the bar counts images" in result.output
    )
    assert (out / ".draft.tmp").exists()
    return out
