"""CLIP score, and FID through torchmetrics, with the weights that the user has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bench.metrics.digest import digest

BATCH = 32  # pictures that CLIP sees at once
ENOUGH = (
    10_000  # images, below which FID is dominated by noise and bias (the authors' code asks for at least that many)
)


def to_uint8(picture: Image.Image) -> torch.Tensor:
    """uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


class Clip:
    """Cosine of CLIP's image and text features, per image (the paper's scale: about 0.3; torchmetrics' is 100 times that).

    model   folder or hub id of a CLIP model with its processor. OSError or ValueError if transformers cannot load it.
    device  where it runs, in float32
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import cached_file

        self.model = CLIPModel.from_pretrained(model).float().to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(model)
        folder = Path(cached_file(model, "config.json")).parent
        weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
        if not weights:
            raise ValueError(f"clip={model!r}: no *.safetensors or *.bin in {folder}; pass a folder that has them")
        files = sorted([*weights, *folder.glob("*.json"), *folder.glob("*.txt")])
        self.network = f"CLIP {model} (sha256 {digest(files)})"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """max(cos, 0), one value an image. A prompt longer than the text encoder's positions is cut, its end token kept."""
        assert len(pictures) == len(prompts), (len(pictures), len(prompts))
        values: list[float] = []
        for start in range(0, len(pictures), BATCH):
            inputs = self.processor(
                text=list(prompts[start : start + BATCH]),
                images=[picture.convert("RGB") for picture in pictures[start : start + BATCH]],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
            )
            found = self.model(**inputs.to(self.model.device))
            values += (found.image_embeds * found.text_embeds).sum(1).clamp(min=0).tolist()
        return values


class Fid:
    """Frechet distance of the features of generated and real pictures.

    features  "inception" (torchmetrics' own, needs torch-fidelity and its weights), or the path of a TorchScript network that maps
              uint8 [B, 3, side, side] to [B, D]
    side      pictures are resized to it (bilinear, antialiased)
    device    where the network and the sums run
    """

    def __init__(self, features: str | torch.nn.Module, device: str = "cpu", *, side: int = 299) -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError:
            raise ImportError("FID needs torchmetrics: pip install 'diffusers-fastguard[metrics]'") from None

        self.side = side
        self.device = "cpu" if torch.device(device).type == "mps" else device  # the sums are float64, which MPS has not
        if isinstance(features, torch.nn.Module):
            self.network, network = type(features).__name__, features
        elif features == "inception":
            self.network, network = "Inception v3 (torch-fidelity's FID weights)", None
        else:
            try:
                content = digest([Path(features)])
                network = torch.jit.load(features, map_location="cpu").eval()
            except (OSError, RuntimeError) as error:
                raise ValueError(f"fid={features!r}: no TorchScript file: {str(error).splitlines()[0]}") from None
            self.network = f"{Path(features).name} (TorchScript, sha256 {content})"
        metric = FrechetInceptionDistance(feature=2048 if network is None else network, reset_real_features=False)
        self.metric = metric.to(self.device)

    @torch.no_grad()
    def _update(self, pictures: Sequence[Image.Image], real: bool) -> None:
        name = f"FID, {'real' if real else 'generated'} images"
        for start in tqdm(range(0, len(pictures), 64), desc=name, unit="batch", mininterval=2, leave=False):
            part = [
                to_uint8(p.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR))
                for p in pictures[start : start + 64]
            ]
            self.metric.update(torch.stack(part).to(self.device), real=real)

    def against(self, real: Sequence[Image.Image]) -> None:
        """Take `real` as what generated pictures are compared with, embedded once. ValueError for fewer than two."""
        import torchmetrics

        _at_least_two("real", real)
        torchmetrics.Metric.reset(self.metric)  # FrechetInceptionDistance's own keeps the real features
        self._update(real, True)

    def __call__(self, generated: Sequence[Image.Image]) -> float:
        """||m_g - m_r||^2 + tr(C_g + C_r - 2 (C_g C_r)^(1/2)). ValueError for fewer than two pictures."""
        _at_least_two("generated", generated)
        self.metric.reset()
        self._update(generated, False)
        return float(self.metric.compute())


def _at_least_two(name: str, pictures: Sequence[Image.Image]) -> None:
    if len(pictures) < 2:
        raise ValueError(f"{name}: {len(pictures)} pictures; FID needs at least 2")


def note(images: int) -> str:
    """What has to stand beside an FID of that many images; empty if they are enough."""
    if images >= ENOUGH:
        return ""
    return f"{images} images: below {ENOUGH:,} the value is dominated by noise and bias; compare only within this table"
