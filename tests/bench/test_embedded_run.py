"""`python -m bench paper` on the embedded model: its own measures, put together here from stock's latents and its networks."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bench.__main__ import app
from bench.paper import inputs
from fastguard import testbed
from fastguard.testbed import classifier

OPTIONS = (
    "--methods none,dtp --guidance-scale 3 --guidance-scales 3 --seeds 2 --detection-seeds 0 --steps 5 --device cpu"
)


def test_results_and_page_hold_its_own_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = inputs.embedded()
    some = [*[item for item in every if item.group == "memorized"][:2], every[-1]]
    assert some[-1].group == "ordinary"
    monkeypatch.setattr(inputs, "embedded", lambda: some)
    result = CliRunner().invoke(app, ["paper", "--out", str(tmp_path), *OPTIONS.split()])
    assert result.exit_code == 0, result.output

    pipe, judge, names = testbed.load(), classifier.load(), list(testbed.concepts())
    drawings = torch.as_tensor(testbed.training_images().copy()).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        known = pipe.vae.encode(drawings).latents.flatten(1).double()
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["id"], r["seed"]) for r in found] == [
        (method, item.prompt, seed)
        for method in ("none", "dtp")
        for item in some
        for seed in range(2 if item.group == "memorized" else 1)
    ]
    for row, (item, seed) in zip(found[:5], [(item, s) for item in some for s in (0, 1)], strict=False):
        generator = torch.Generator().manual_seed(100_003 * seed + zlib.crc32(item.prompt.encode()))
        call_of = {"generator": generator, "num_inference_steps": 5, "guidance_scale": 3.0}
        z = pipe(item.prompt, output_type="latent", **call_of).images
        cosine = torch.cosine_similarity(z.flatten(1).double(), known)
        assert row["similarity_set"] == pytest.approx(cosine.max().item(), abs=1e-3)
        if item.group == "memorized":
            own = item.training[0]
            far = (z.flatten().double() - known[own]).square().mean().sqrt().item()
            assert row["similarity"] == pytest.approx(cosine[own].item(), abs=1e-3)
            assert row["distance"] == pytest.approx(far, abs=1e-3) and row["copy"] is (row["distance"] < 0.5)
        else:
            assert row["similarity"] is row["copy"] is None
        picture = np.asarray(Image.open(tmp_path / row["image"]), int)
        with torch.no_grad():
            logits = judge(torch.as_tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1)[0]
            assert np.abs(picture - decoded(pipe, z)).max() <= 1
        assert row["faithful"] is (names[int(logits.argmax())] == item.extra.concept)
        assert row["faithful5"] is (item.extra.concept in [names[i] for i in logits.topk(5).indices])
    assert any(a["similarity"] != b["similarity"] for a, b in zip(found[:4], found[5:9], strict=True))

    table = json.loads((tmp_path / "summary.json").read_text())["tables"]["memorized"]["none"]
    assert table["similarity"]["mean"] == pytest.approx(np.mean([r["similarity"] for r in found[:4]]))
    for name in ("report.html", "tables.md"):
        text = (tmp_path / name).read_text()
        assert "cosine of latents, the embedded autoencoder" in text
        assert "the embedded classifier, concept is the first choice" in text and "SSCD, " not in text


def decoded(pipe: Any, z: torch.Tensor) -> np.ndarray:
    x = pipe.vae.decode(z).sample[0].clamp(-1, 1)
    return ((x + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)
