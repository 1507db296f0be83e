"""CLIP score and FID through torchmetrics, with the weights that the user has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ENOUGH = (
    10_000  # images, below which FID is dominated by noise and bias (the authors' code asks for at least that many)
)


def to_uint8(picture: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError:
        raise ImportError("CLIP score and FID need torchmetrics: pip install 'fastguard[metrics]'") from None
    return torchmetrics


class Clip:
    """Cosine of CLIP's image and text features, per image (the paper's scale: about 0.3; torchmetrics' is 100 times that).

    model  folder or hub id of a CLIP model with its processor. OSError or ValueError if transformers cannot load it.
    """

    def __init__(self, model: str) -> None:
        _torchmetrics()
        from torchmetrics.multimodal.clip_score import CLIPScore
        from transformers import CLIPModel, CLIPProcessor

        pair = _tensors(CLIPModel.from_pretrained(model).eval()), CLIPProcessor.from_pretrained(model)
        self.network = f"CLIP {model}"
        self.metric = CLIPScore(model_name_or_path=lambda: pair)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One value an image. torchmetrics clips a mean at zero, so a negative cosine comes out as 0."""
        values = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            self.metric.reset()
            self.metric.update(to_uint8(picture), prompt)
            values.append(float(self.metric.compute()) / 100)
        return values


def _tensors(model: Any) -> Any:
    """transformers 5 returns an output object where torchmetrics 1.9 expects the projected features themselves."""
    for name in ("get_image_features", "get_text_features"):
        original = getattr(model, name)

        def features(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            found = _original(*args, **kwargs)
            return found if isinstance(found, torch.Tensor) else found.pooler_output

        setattr(model, name, features)
    return model


class Fid:
    """Frechet distance of the features of generated and real pictures.

    features  "inception" (torchmetrics' own, needs torch-fidelity and its weights), or the path of a TorchScript network that maps
              uint8 [B, 3, side, side] to [B, D]
    side      pictures are resized to it (bilinear, antialiased)
    """

    def __init__(self, features: str | torch.nn.Module, *, side: int = 299) -> None:
        _torchmetrics()
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.side = side
        if isinstance(features, torch.nn.Module):
            self.network, network = type(features).__name__, features
        elif features == "inception":
            self.network, network = "Inception v3 (torch-fidelity's FID weights)", None
        else:
            try:
                digest = hashlib.sha256(Path(features).read_bytes()).hexdigest()[:12]
                network = torch.jit.load(features, map_location="cpu").eval()
            except (OSError, RuntimeError) as error:
                raise ValueError(f"fid={features!r}: no TorchScript file: {str(error).splitlines()[0]}") from None
            self.network = f"{Path(features).name} (TorchScript, sha256 {digest})"
        self.metric = FrechetInceptionDistance(feature=2048 if network is None else network)

    @torch.no_grad()
    def _update(self, pictures: Sequence[Image.Image], real: bool) -> None:
        for start in range(0, len(pictures), 64):
            part = [
                to_uint8(p.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR))
                for p in pictures[start : start + 64]
            ]
            self.metric.update(torch.stack(part), real=real)

    def __call__(self, generated: Sequence[Image.Image], real: Sequence[Image.Image]) -> float:
        """||m_g - m_r||^2 + tr(C_g + C_r - 2 (C_g C_r)^(1/2)). ValueError for fewer than two pictures on a side."""
        for name, pictures in (("generated", generated), ("real", real)):
            if len(pictures) < 2:
                raise ValueError(f"{name}: {len(pictures)} pictures; FID needs at least 2")
        self.metric.reset()
        self._update(real, True)
        self._update(generated, False)
        return float(self.metric.compute())


def note(images: int) -> str:
    """What has to stand beside an FID of that many images; empty if they are enough."""
    if images >= ENOUGH:
        return ""
    return f"{images} images: below {ENOUGH:,} the value is dominated by noise and bias; compare only within this table"
