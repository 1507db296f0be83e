"""Latents to images as the pipelines themselves do it after their loop: the same bits, from another thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image


@dataclass(frozen=True)
class Decoded:
    """An image, and what stock only logs. blacked: by the safety checker; finite: all that the autoencoder returned."""

    image: Image.Image
    blacked: bool = False
    finite: bool = True


Decoder = Callable[[Any, torch.Tensor], list[Decoded]]


def decoder(pipe: Any) -> Decoder | None:
    """How `pipe` decodes, if that is known and its modules may run beside each other; None: let its own call do it.

    Offloaded models move to the device and back as the stages take turns, so they must take turns.
    """
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        return None
    if any(hasattr(module, "_hf_hook") for module in pipe.components.values()):
        return None
    for name, known in _DECODERS.items():
        if isinstance(pipe, getattr(diffusers, name)):
            return known
    return None


def of_call(pipe: Any, output: Any) -> list[Decoded]:
    """The images of the pipeline's own call with output_type="pt"."""
    images = output.images
    if not isinstance(images, torch.Tensor):
        return [Decoded(image) for image in images]
    processor = pipe.image_processor
    flagged = getattr(output, "nsfw_content_detected", None)
    return _noted(processor.numpy_to_pil(processor.pt_to_numpy(images)), images, flagged)


def _noted(
    pictures: Sequence[Image.Image], returned: torch.Tensor, flagged: Sequence[bool] | None = None
) -> list[Decoded]:
    """returned: by the autoencoder, [B, 3, H, W]; flagged: by the safety checker, None if there is none."""
    finite = returned.flatten(1).isfinite().all(1).tolist()
    blacked = [False] * len(finite) if flagged is None else [bool(flag) for flag in flagged]
    return [Decoded(*values) for values in zip(pictures, blacked, finite, strict=True)]


def _stable_diffusion(pipe: Any, latents: torch.Tensor) -> list[Decoded]:
    returned = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    image, flagged = pipe.run_safety_checker(returned, latents.device, latents.dtype)
    normal = [True] * image.shape[0] if flagged is None else [not flag for flag in flagged]
    return _noted(pipe.image_processor.postprocess(image, output_type="pil", do_denormalize=normal), returned, flagged)


def _stable_diffusion_xl(pipe: Any, latents: torch.Tensor) -> list[Decoded]:
    vae, config = pipe.vae, pipe.vae.config
    upcast = vae.dtype == torch.float16 and config.force_upcast  # overflows in float16
    if upcast:
        pipe.upcast_vae()
        latents = latents.to(next(iter(vae.post_quant_conv.parameters())).dtype)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v).view(1, 4, 1, 1).to(latents.device, latents.dtype) for v in (mean, std))
        latents = latents * std / config.scaling_factor + mean
    else:
        latents = latents / config.scaling_factor
    image = returned = vae.decode(latents, return_dict=False)[0]
    if upcast:
        vae.to(dtype=torch.float16)
    if pipe.watermark is not None:
        image = pipe.watermark.apply_watermark(image)
    return _noted(pipe.image_processor.postprocess(image, output_type="pil"), returned)


def _stable_diffusion_3(pipe: Any, latents: torch.Tensor) -> list[Decoded]:
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    returned = pipe.vae.decode(latents, return_dict=False)[0]
    return _noted(pipe.image_processor.postprocess(returned, output_type="pil"), returned)


_DECODERS: dict[str, Decoder] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
}
