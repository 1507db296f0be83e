"""`python -m bench paper` on a model with its own prompts and training images, from the command line to the page."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import fastguard
from bench.__main__ import app
from bench.methods import Ren
from bench.paper import command
from bench.paper.detection import STATISTICS
from bench.paper.inputs import Item, limited
from fastguard import testbed


class Pooled(torch.nn.Module):
    """A 4 x 4 thumbnail, centred: a descriptor that knows more than colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return x - x.mean(1, keepdim=True)


class Colours(torch.nn.Module):
    """In place of Inception: mean and deviation of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


@pytest.fixture(scope="module")
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


def call(given: Path, out: Path, flags: Sequence[str] = (), **changed: Any) -> Any:
    options: dict[str, Any] = {
        "model": testbed.path(),
        "prompts": given / "prompts.jsonl",
        "ordinary": given / "ordinary.jsonl",
        "train-images": given / "train",
        "sscd": given / "sscd.pt",
        "methods": "stp,ren",
        "guidance-scales": "3,7.5",
        "seeds": 2,
        "detection-seeds": 4,
        "steps": 3,
        "batch-size": 8,
        "seconds": 0,
        "device": "cpu",
        "out": out,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    arguments = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return CliRunner().invoke(app, ["paper", *arguments, *flags])


@pytest.fixture(scope="module")
def done(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    (out / ".draft.tmp").write_text("was there before")
    result = call(given, out)
    assert result.exit_code == 0, result.output
    assert (
        "64 of 64 images still to make, about 424 rows of the denoiser at most; the bar counts images" in result.output
    )
    assert (out / ".draft.tmp").exists()
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


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


def test_a_dry_run_reads_everything_and_writes_nothing(given: Path, done: Path, tmp_path: Path) -> None:
    result = call(given, tmp_path / "new", flags=("--dry-run",))
    assert result.exit_code == 0, result.output
    said = (
        "2 memorized and 3 ordinary prompts, 3 training images",
        "ren: 11 images, at most 6 rows",
        "in all 64 images, at most 424",
    )
    assert all(part in result.output for part in said), result.output
    assert not (tmp_path / "new").exists()
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    result = call(given, done, flags=("--dry-run",), steps=4)
    assert result.exit_code == 2 and "steps: 3 there, 4 now" in result.output
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_a_limit_keeps_that_many_of_each_group(given: Path, tmp_path: Path) -> None:
    result = call(given, tmp_path / "out", flags=("--dry-run",), limit=1)
    assert "1 memorized and 1 ordinary prompts" in result.output
    items = [Item("memorized", str(k), "", "") for k in range(10)] + [Item("ordinary", "o", "", "")]
    assert [item.id for item in limited(items, 3)] == ["0", "3", "6", "o"] and limited(items, None) == items


def test_stopped_by_hand(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ren, "generate", stop)
    result = call(given, tmp_path)
    assert result.exit_code == 130 and "the same command resumes" in result.output and "Traceback" not in result.output
    monkeypatch.undo()
    kept = rows(tmp_path)
    assert kept and call(given, tmp_path).exit_code == 0 and rows(tmp_path)[: len(kept)] == kept


def test_seconds_are_measured_by_turns_and_kept(given: Path, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "out")
    assert call(given, tmp_path / "out", seconds=2).exit_code == 0
    found = json.loads((tmp_path / "out/seconds.json").read_text())
    assert set(found) == {"cfg", "stp", "ren"} and all(len(v) == 2 and min(v) > 0 for v in found.values())
    low, high = sorted(found["ren"])
    cell = json.loads((tmp_path / "out/summary.json").read_text())["tables"]["memorized"]["ren"]["seconds ratio"]
    assert cell["median"] == pytest.approx((low + high) / 2) and cell["pairs"] == 2


def test_running_again_makes_nothing_and_methods_can_be_added(given: Path, done: Path) -> None:
    before = (done / "results.jsonl").read_bytes()
    (done / "images" / ".a.png.0.tmp").write_text("left by a kill")
    assert call(given, done, methods="none").exit_code == 0
    assert not list(done.rglob(".*.tmp"))
    assert (done / "results.jsonl").read_bytes() == before
    tables = json.loads((done / "summary.json").read_text())["tables"]["memorized"]
    assert set(tables) == {"none", "cfg", "stp", "ren"}  # those of the earlier run are still there


def test_fid_says_what_it_was_compared_with(given: Path, done: Path) -> None:
    """It is computed anew from the kept images, so a finished folder may ask for it, and for other real images."""
    pytest.importorskip("torchmetrics")
    torch.jit.script(Colours()).save(str(given / "colours.pt"))
    before, fid = (done / "results.jsonl").read_bytes(), {"fid": given / "colours.pt", "methods": "none"}
    (given / "real").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (16, 16), colour).save(given / "real" / f"{number}.png")
    found = []
    for more, said in (
        (
            {},
            "FID: against the 3 training images, as no --real-images were given; copies of them make it better; 4 images",
        ),
        ({"real_images": given / "real"}, "FID: against the 3 images of --real-images; 4 images: below 10,000"),
    ):
        result = call(given, done, **fid, **more)
        assert result.exit_code == 0, result.output
        assert all(said in (done / name).read_text() for name in ("report.html", "tables.md"))
        found.append(json.loads((done / "summary.json").read_text())["fid"]["values"]["memorized"]["none"])
    assert found[1] > 1.2 * found[0] and (done / "results.jsonl").read_bytes() == before


def test_the_networks_are_asked_for_on_the_runs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchscript_sscd", "onnx_sscd", "Clip", "Fid"):
        monkeypatch.setattr(command, name, lambda *given, name=name: (name, *given))
    assert command.find_sscd("a.pt", "cuda:1") == ("torchscript_sscd", Path("a.pt"), "cuda:1")
    assert command.find_sscd("onnx", "cuda:1") == ("onnx_sscd", "cuda:1")
    request: Any = SimpleNamespace(clip="c", fid="f")
    assert command.find_scores(request, "cuda:1") == (("Clip", "c", "cuda:1"), ("Fid", "f", "cuda:1"))


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": None}, "--model and --prompts go together"),
        ({"train_images": None}, "--train-images: is needed"),
        ({"seeds": 0}, "--seeds=0: must be at least 1"),
        ({"batch_size": 0}, "--batch-size=0"),
        ({"guidance_scales": "7.5,1"}, "guidance scale 1.0: must be above 1"),
        ({"guidance_scales": "3,7.5000001"}, "guidance scales 7.5 and 7.5000001: are both 7.5 in six digits"),
        ({"guidance_scales": "a"}, "--guidance-scales='a'"),
        ({"gate": "nan"}, "--gate=nan"),
        ({"methods": "stp,nothing"}, "'nothing' is unknown; allowed are none"),
        ({"methods": "og+sp"}, "'og+sp' is unknown, did you mean 'og+stp'?"),
        ({"methods": "dtp-gated"}, "dtp-gated: needs --gate or --policy"),
        ({"methods": "embedded-policy"}, "belongs to the embedded model; pass --policy FILE"),
        ({"methods": "first-look", "detection_seeds": 0}, "first-look: needs --detection-seeds"),
        ({"lora": "missing"}, "lora='missing'"),
        ({"policy": "missing.json"}, "missing.json"),
        ({"limit": 0}, "--limit=0: must be at least 1"),
        ({"sscd": "missing.pt"}, "no TorchScript file"),
        ({"clip": "missing-folder/at/all"}, "--clip"),
        ({"prompts": "missing.jsonl"}, "prompts='missing.jsonl'"),
        ({"model": "./missing"}, "no such directory"),
        ({"real_images": "missing"}, "--real-images: is for --fid, which is not given"),
        ({"fid": "inception", "real_images": "missing"}, "real-images='missing'"),
        ({"fid": "inception", "real_images": "{given}/one"}, "--fid: 1 problem, nothing was done\n  1 image"),
    ],
)
def test_bad_arguments_leave_nothing_behind(given: Path, tmp_path: Path, changed: dict, message: str) -> None:
    changed = {name: value.format(given=given) if isinstance(value, str) else value for name, value in changed.items()}
    result = call(given, tmp_path / "out", **changed)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (tmp_path / "out").exists()
