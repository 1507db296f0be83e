"""What is measured on every image. The columns have the same meaning whatever network fills them:

similarity       to the prompt's own training images (the most similar one); None for ordinary prompts
similarity_set   to the most similar image of the whole training set
copy             whether the image counts as a copy of its own training image
faithful         how well the image shows its prompt, higher is better

`networks` says for each column which network made it.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bench.metrics import Clip, Sscd, cosine, own, whole_set
from bench.metrics.pairings import SHARE_ABOVE
from bench.metrics.sscd import BATCH
from bench.paper.inputs import Item, TrainingSet
from fastguard.files import write_atomic

DECODED = 8  # latents decoded at once


class Measure(Protocol):
    """Pictures and latents of some prompts in, one value per image and column out."""

    networks: dict[str, str]

    def __call__(
        self, pictures: Sequence[Image.Image], latents: torch.Tensor, items: Sequence[Item]
    ) -> dict[str, list[Any]]: ...


class Embedded:
    """The embedded model's own measures (`fastguard/testbed/measures.py`): its autoencoder and its classifier, in float32 on the CPU."""

    def __init__(self, pipe: Any, training: Sequence[Image.Image] | None = None) -> None:
        """`training`: the images that prompts count their `index` in; the model's own unless given."""
        from fastguard.testbed.measures import COPY, Judge, to_tensor

        self.judge = Judge(SimpleNamespace(vae=copy.deepcopy(pipe.vae).cpu()))  # type: ignore[arg-type]  # all it looks at
        if training is not None:
            self.judge.targets = self.judge.encode(to_tensor(np.stack([np.asarray(image) for image in training])))
        latent = "cosine of latents, the embedded autoencoder"
        seen = "the embedded classifier"
        self.networks = {
            "similarity": latent,
            "similarity_set": latent,
            "copy": f"RMS difference of latents below {COPY}, the embedded autoencoder",
            "faithful": f"{seen}, concept is the first choice",
            "faithful5": f"{seen}, concept among the first five",
            "blown": "the latent does not survive decoding and encoding, the embedded autoencoder",
        }

    def __call__(
        self, pictures: Sequence[Image.Image], latents: torch.Tensor, items: Sequence[Item]
    ) -> dict[str, list[Any]]:
        z = latents.detach().float().cpu()
        measured = self.judge(z, [item.extra for item in items])
        z = torch.where(z.flatten(1).isfinite().all(1)[:, None, None, None], z, torch.full_like(z, 10.0))
        flat = z.flatten(1).numpy(), self.judge.targets.flatten(1).numpy()
        return {**measured, "similarity_set": cosine(*flat).max(1).tolist()}

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """The pictures that the judge sees."""
        shown = self.judge.decode(latents.detach().float().cpu().nan_to_num()).add(1).mul(127.5).round().byte()
        return [Image.fromarray(x) for x in shown.permute(0, 2, 3, 1).numpy()]


class SscdMeasure:
    """SSCD in both pairings; a copy is an own similarity above 0.5.

    training  gives the descriptors [M, D] of the training set; asked for once, when the first image is measured
    name      "similarity" where SSCD is the measure of the tables, "sscd" where it stands beside the embedded model's own
    """

    def __init__(self, sscd: Sscd, training: Callable[[], np.ndarray], name: str = "similarity") -> None:
        self.sscd, self.name = sscd, name
        self._get = training
        self._training: np.ndarray | None = None
        self.networks = {name: sscd.network, f"{name}_set": sscd.network}
        if name == "similarity":
            self.networks["copy"] = f"similarity above {SHARE_ABOVE}: {sscd.network}"

    def __call__(
        self, pictures: Sequence[Image.Image], latents: torch.Tensor, items: Sequence[Item]
    ) -> dict[str, list[Any]]:
        found = self.sscd(pictures)
        if self._training is None:
            self._training = self._get()
        near = own(found, self._training, [item.training for item in items])
        result: dict[str, list[Any]] = {self.name: near, f"{self.name}_set": whole_set(found, self._training)}
        if self.name == "similarity":
            result["copy"] = [None if value is None else value > SHARE_ABOVE for value in near]
        return result


class ClipMeasure:
    """CLIP score; the measure of faithfulness where the model is not the embedded one (`name` as for `SscdMeasure`)."""

    def __init__(self, clip: Clip, name: str = "faithful") -> None:
        self.clip, self.name, self.networks = clip, name, {name: clip.network}

    def __call__(
        self, pictures: Sequence[Image.Image], latents: torch.Tensor, items: Sequence[Item]
    ) -> dict[str, list[Any]]:
        return {self.name: self.clip(pictures, [item.prompt for item in items])}


def training_descriptors(sscd: Sscd, training: TrainingSet, out: Path) -> np.ndarray:
    """Descriptors [M, D] of the training images, kept in `out` under the network and the hash of the images."""
    name = hashlib.sha256(f"{sscd.network} {training.key}".encode()).hexdigest()[:16]
    path = out / f"training-{name}.npy"
    if path.exists():
        return np.load(path)
    parts = []
    for start in tqdm(range(0, len(training), BATCH), desc="training images", unit="batch", mininterval=2):
        parts.append(sscd(training[start : start + BATCH]))
    found, data = np.concatenate(parts), io.BytesIO()
    np.save(data, found)
    write_atomic(path, data.getvalue())
    return found


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> list[Image.Image]:
    """The pipeline's own pictures of latents [B, C, H, W]: vae.decode(z / scaling + shift). What is not finite becomes 0."""
    vae = pipe.vae
    dtype = vae.dtype
    wide = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if wide:
        vae.to(torch.float32)
    try:
        z = latents.to(vae.device, vae.dtype).nan_to_num()
        z = z / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        shown = torch.cat([vae.decode(part, return_dict=False)[0] for part in z.split(DECODED)])
    finally:
        if wide:
            vae.to(dtype)
    return pipe.image_processor.postprocess(shown.float().nan_to_num(), output_type="pil")
