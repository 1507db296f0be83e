"""`python -m bench paper` on a model with its own prompts and training images, from the command line to the page."""

from __future__ import annotations

import io
import json
import zlib
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastguard
from bench.paper.detection import STATISTICS
from fastguard import testbed
from tests.bench.own_model import Colours, call, rows


def test_every_image_is_kept_with_its_numbers(done: Path) -> None:
    count = {
        "none": 2 * 2 * 2 + 3,
        "stp": 2 * 2 * 2 + 3,
        "ren": 2 * 2 * 2 + 3,
        "cfg": 2 * 2 * 2 + 3,
        "first-look": (2 + 3) * 4,
    }
    found = rows(done)
    assert {name: sum(r["method"] == name for r in found) for name in count} == count
    assert all(Image.open(done / r["image"]).size == (32, 32) for r in found)
    assert all(r["rows"] == 6 for r in found if r["method"] in ("none", "cfg", "ren"))
    assert all(r["rows"] == 8 for r in found if r["method"] == "first-look")  # three rows and an extra pair


def test_a_kept_image_is_what_the_pipeline_makes(done: Path) -> None:
    """Prompt and documented seed into a plain call: 100003 seed + crc32(id)."""
    pipe = testbed.load()
    shown = {}
    for row in (r for r in rows(done) if (r["method"], r["group"], r["scale"]) == ("none", "memorized", 7.5)):
        generator = torch.Generator().manual_seed(100_003 * row["seed"] + zlib.crc32(row["id"].encode()))
        want = pipe(row["prompt"], generator=generator, num_inference_steps=3, guidance_scale=7.5).images[0]
        kept = shown[row["id"], row["seed"]] = np.asarray(Image.open(done / row["image"]), int)
        # A batch of four sums otherwise than one alone, which may show in the last of 8 bits.
        assert np.abs(kept - np.asarray(want, int)).max() <= 1
    assert len(shown) == 4
    assert all(np.abs(shown[index, 0] - shown[index, 1]).max() > 20 for index in "01")


def test_settings_keep_what_made_the_images(done: Path) -> None:
    kept = json.loads((done / "settings.json").read_text())
    assert kept["versions"] == {
        "fastguard": fastguard.__version__,
        "torch": torch.__version__,
        **{name: version(name) for name in ("diffusers", "transformers")},
    }
    assert (kept["steps"], kept["scheduler"], kept["device"], kept["dtype"]) == (3, "DDIMScheduler", "cpu", "float32")
    assert kept["methods"]["none"] == {} and kept["methods"]["ren"] == {"c1": 1.25, "name": "ren"}
    assert kept["methods"]["stp"] == {"policy": fastguard.policy("stp").to_dict()}


def test_similarity_is_that_of_the_kept_image_and_the_training_image(given: Path, done: Path) -> None:
    from bench.metrics.sscd import preprocess

    def descriptor(path: Path) -> np.ndarray:
        x = preprocess(Image.open(path)).numpy().reshape(3, 4, 56, 4, 56).mean((2, 4)).ravel().astype(float)
        return (x - x.mean()) / np.linalg.norm(x - x.mean())

    row = next(r for r in rows(done) if r["method"] == "none" and r["id"] == "1")
    image = descriptor(done / row["image"])
    assert row["similarity"] == pytest.approx(image @ descriptor(given / "train/1_0.png"), abs=1e-4)
    every = [image @ descriptor(path) for path in sorted((given / "train").iterdir())[:2]]
    assert row["similarity_set"] == pytest.approx(max(every), abs=1e-4)
    assert row["copy"] is (row["similarity"] > 0.5)


def test_methods_start_from_the_same_noise(done: Path) -> None:
    images = {(r["method"], r["id"], r["seed"], r["scale"]): (done / r["image"]).read_bytes() for r in rows(done)}
    first = {key[1:]: data for key, data in images.items() if key[0] == "none"}
    for (method, *rest), data in images.items():
        if method == "cfg" and tuple(rest) in first:  # other code, other rounding
            pair = [np.asarray(Image.open(io.BytesIO(d)), int) for d in (data, first[tuple(rest)])]
            assert np.abs(pair[0] - pair[1]).max() <= 1


def test_the_page_stands_alone_and_says_what_made_the_numbers(done: Path) -> None:
    text = (done / "report.html").read_text()

    class Sources(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]

    Sources().feed(text)
    assert len(Sources.found) >= 2 and all(
        source.startswith("data:image/") and ";base64," in source[:40] for source in Sources.found
    )
    assert "wen-1, " in text.split("Left out by --methods: ")[1].split("</")[0] and "(not asked for)" not in text
    assert "sscd.pt (TorchScript" in text and "(theirs)" in text
    assert "No verdict: no measure of faithfulness was given (--clip)" in text
    assert "0.6504" in (done / "tables.md").read_text()  # S1 without mitigation, published


def test_parquet_has_the_rows(done: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(done / "results.parquet").to_pylist()
    assert [(r["method"], r["id"], r["seed"], r["similarity"]) for r in table] == [
        (r["method"], r["id"], r["seed"], r["similarity"]) for r in rows(done)
    ]


def test_detection_is_computed_from_the_kept_curves(done: Path) -> None:
    cells = json.loads((done / "summary.json").read_text())["detection"]
    all_rows = "RMS(c - u), all rows"  # of cfg, two seeds
    assert [(c["statistic"], c["seeds"]) for c in cells] == [
        (name, n) for name in STATISTICS for n in ((1,) if name == all_rows else (1, 4))
    ]
    first = {"memorized": [], "ordinary": []}
    for r in rows(done):
        if r["method"] == "first-look":
            first[r["group"]].append(r["details"]["d_curve"][0])
    wins = [a > b for a in first["memorized"] for b in first["ordinary"]]
    assert cells[0]["auc"]["mean"] == pytest.approx(sum(wins) / len(wins))


def test_fid_says_what_it_was_compared_with(given: Path, done: Path, tmp_path: Path) -> None:
    """It is computed anew from the kept images, so a finished folder may ask for it, and for other real images."""
    pytest.importorskip("torchmetrics")
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    before, fid = (done / "results.jsonl").read_bytes(), {"fid": tmp_path / "colours.pt", "methods": "none"}
    (tmp_path / "real").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / "real" / f"{number}.png")
    found = []
    for more, said in (
        (
            {},
            "FID: against the 3 training images, as no --real-images were given; copies of them make it better; 4 images",
        ),
        ({"real_images": tmp_path / "real"}, "FID: against the 3 images of --real-images; 4 images: below 10,000"),
    ):
        result = call(given, done, **fid, **more)
        assert result.exit_code == 0, result.output
        assert all(said in (done / name).read_text() for name in ("report.html", "tables.md"))
        found.append(json.loads((done / "summary.json").read_text())["fid"]["values"]["memorized"]["none"])
    assert found[1] > 1.2 * found[0] and (done / "results.jsonl").read_bytes() == before
