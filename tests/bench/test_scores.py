"""CLIP score and FID against the same numbers computed another way; which images FID is of, and against which."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.metrics import ENOUGH, Clip, Fid, note
from bench.paper import report
from bench.paper.inputs import Images, Item, TrainingSet
from bench.paper.measures import ClipMeasure
from bench.paper.work import Amount
from fastguard import testbed

PROMPTS = ["wolf icon", "a drawing of a egg", "key sticker", "egg " * 30]  # the last is longer than the 16 positions


def pictures(count: int, low: int = 0, high: int = 256) -> list[Image.Image]:
    rng = np.random.default_rng(low)
    return [Image.fromarray(rng.integers(low, high, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


class Pooled(torch.nn.Module):
    """Mean and standard deviation of each channel; counts the pictures that it saw."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        x = x.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights and the embedded model's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = testbed.load().tokenizer
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tiny, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(6)  # one cosine is negative, the others are not
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tiny, "image_size": 32, "patch_size": 16}))
    for weight in model.parameters():
        weight.data *= 8.0 if weight.ndim > 1 else 1.0  # as it starts, it hardly tells one text or picture from another
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    out = tmp_path_factory.mktemp("clip")
    model.save_pretrained(out)
    CLIPProcessor(image, tokenizer).save_pretrained(out)
    return out


@torch.no_grad()
def cosines(folder: Path, shown: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """One image at a time, from the two towers and their projections, in float64."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder).double().eval(), CLIPProcessor.from_pretrained(folder)
    tokenizer, found = processor.tokenizer, []
    for picture, prompt in zip(shown, prompts, strict=True):
        pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"].double()
        ids = tokenizer(prompt)["input_ids"]
        ids = ids if len(ids) <= 16 else [*ids[:15], tokenizer.eos_token_id]
        a = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        b = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0]
        found.append(max(0.0, float(a @ b / a.norm() / b.norm())))
    return found


def test_clip_score_is_the_cosine_of_the_features_in_one_batch(folder: Path) -> None:
    clip, calls = Clip(str(folder)), []
    clip.model.register_forward_hook(lambda *_: calls.append(1))
    shown = pictures(4)
    expected = cosines(folder, shown, PROMPTS)
    assert len(set(expected)) == 4 and min(expected) == 0
    assert clip(shown, PROMPTS) == pytest.approx(expected, abs=1e-5) and len(calls) == 1
    assert clip(shown * 9, PROMPTS * 9) == pytest.approx(expected * 9, abs=1e-5)  # 36: a batch and a rest


def test_the_measure_scores_every_image_with_its_own_prompt(folder: Path) -> None:
    items = [Item("memorized", prompt, prompt, "memorized") for prompt in PROMPTS]
    clip, shown = Clip(str(folder)), pictures(4)
    found = ClipMeasure(clip)(shown, torch.zeros(4), items)
    assert found == {"faithful": pytest.approx(cosines(folder, shown, PROMPTS), abs=1e-5)}
    assert list(ClipMeasure(clip, "clip")(shown, torch.zeros(4), items)) == ["clip"]


def test_clip_is_named_by_the_contents_of_its_files(folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert "model.safetensors" in names
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "README.md").write_text("not read by anything")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    content = hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    assert Clip(str(tmp_path)).network == f"CLIP {tmp_path} (sha256 {content})"
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "model.safetensors")
    weights["logit_scale"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert content not in Clip(str(tmp_path)).network


def test_fid_is_the_frechet_distance_of_the_features_and_embeds_the_real_ones_once() -> None:
    pytest.importorskip("torchmetrics")
    linalg = pytest.importorskip("scipy.linalg")
    network = Pooled()
    fid = Fid(network, side=32)

    def moments(some: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        arrays = [np.asarray(picture, float) for picture in some]
        f = np.stack([np.r_[x.mean((0, 1)), x.reshape(-1, 3).std(0, ddof=1)] for x in arrays])
        return f.mean(0), np.cov(f, rowvar=False)

    def expected(fake: Sequence[Image.Image], real: Sequence[Image.Image]) -> Any:
        (m1, c1), (m2, c2) = moments(fake), moments(real)
        distance = float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(linalg.sqrtm(c1 @ c2))))
        return pytest.approx(distance, rel=1e-3)  # torchmetrics takes the features in float32

    real, one, two = pictures(80, 0, 200), pictures(30, 40), pictures(20, 80)
    fid.against(real)
    assert [fid(one), fid(two), fid(one)] == [expected(one, real), expected(two, real), expected(one, real)]
    assert network.seen == 80 + 30 + 20 + 30
    fid.against(two)
    assert fid(one) == expected(one, two)
    for some in (fid, fid.against):
        with pytest.raises(ValueError, match="1 pictures; FID needs at least 2"):
            some(real[:1])


@pytest.mark.parametrize(
    "device",
    ["meta", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_networks_are_on_the_device(folder: Path, device: str) -> None:
    """Without a GPU only where they are can be looked at; with one, that they say what they say on the CPU."""
    pytest.importorskip("torchmetrics")
    clip, fid = Clip(str(folder), device), Fid(Pooled(), device, side=32)
    assert clip.model.device.type == fid.metric.real_features_sum.device.type == device
    if device == "cuda":
        shown, cpu = pictures(4), Fid(Pooled(), side=32)
        assert clip(shown, PROMPTS) == pytest.approx(Clip(str(folder))(shown, PROMPTS), abs=1e-4)
        for one in (fid, cpu):
            one.against(pictures(9, 40))
        assert fid(shown) == pytest.approx(cpu(shown), rel=1e-3)


def test_fid_of_few_images_says_that_it_is_noise() -> None:
    assert "noise" in note(ENOUGH - 1) and note(ENOUGH) == ""


class Red:
    """In place of FID: the mean of red in the generated images; keeps what it was compared with."""

    network = "red"

    def __init__(self) -> None:
        self.real: list[int] = []

    def against(self, real: Sequence[Image.Image]) -> None:
        self.real.append(len(real))

    def __call__(self, generated: Sequence[Image.Image]) -> float:
        return float(np.mean([picture.getpixel((0, 0))[0] for picture in generated]))


def test_fid_is_of_the_images_of_the_tables(tmp_path: Path) -> None:
    """Of one method, group and scale, and of the seeds of the tables."""
    rows = []
    for group, method, scale, seed, red in (
        ("memorized", "a", 5.0, 0, 10),
        ("memorized", "a", 5.0, 1, 20),
        ("memorized", "a", 5.0, 2, 90),  # a seed for detection
        ("memorized", "a", 2.0, 0, 100),  # another scale
        ("memorized", "a", 2.0, 1, 100),
        ("memorized", "b", 5.0, 0, 200),
        ("memorized", "b", 5.0, 1, 200),
        ("ordinary", "a", 5.0, 0, 250),
        ("ordinary", "a", 5.0, 0, 252),
    ):
        rows.append({"group": group, "method": method, "scale": scale, "seed": seed, "image": f"{len(rows)}.png"})
        Image.new("RGB", (2, 2), (red, 0, 0)).save(tmp_path / rows[-1]["image"])
    store: Any = SimpleNamespace(out=tmp_path, rows=rows)
    amount = Amount(scale=5.0, scales=(2.0,), seeds=2, ordinary=1, detection=3, batch=6)
    training, fid = TrainingSet(range(7), lambda i: Image.new("RGB", (2, 2)), ""), Red()
    found = report.fid_values(store, ["a", "b"], amount, fid, training)  # type: ignore[arg-type]
    assert found["values"] == {"memorized": {"a": 15.0, "b": 200.0}, "ordinary": {"a": 251.0}}
    assert fid.real == [7]
    for text in found["notes"].values():
        assert text.startswith("against the 7 training images") and "2 images: below 10,000" in text
    real = Images(range(5), lambda i: Image.new("RGB", (2, 2)))
    found = report.fid_values(store, ["a"], amount, fid, training, real)  # type: ignore[arg-type]
    assert fid.real == [7, 5] and found["notes"]["memorized"].startswith("against the 5 images of --real-images")
