"""Stable Diffusion 1.5 and SDXL at their real size without their weights: structure and shapes only, built in a second."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import diffusers
import torch

from fastguard.syncs import probe
from fastguard.syncs.pretend import Pretend
from fastguard.syncs.stream import Stream

_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# As published: runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0, unet/config.json.
_UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
SIZES = tuple(_UNETS)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, a model in which syncs were looked for is not copied again, nor run again on arguments of the same kind: do not change it."""
    device = Pretend(Stream())

    def same_device(stream: Stream) -> Pretend:
        device.stream = stream
        return device

    with mock.patch.multiple(probe, Pretend=same_device, listening=functools.cache(probe.listening)):
        yield


def unet(size: str, dtype: torch.dtype = torch.float16) -> Any:
    """The UNet on the meta device."""
    with torch.device("meta"):
        return _cast(diffusers.UNet2DConditionModel(**_UNETS[size]), dtype)


def pipeline(size: str, scheduler: Any, model: Any = None, dtype: torch.dtype = torch.float16) -> Any:
    """Text-to-image without text encoders: pass embeddings. `model` is an earlier `unet(size)`."""
    with torch.device("meta"):
        vae = _cast(diffusers.AutoencoderKL(**_VAE), dtype)
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "unet": model or unet(size, dtype),
        "scheduler": scheduler,
    }
    pipe: Any
    if size == "SDXL":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=None, tokenizer_2=None)
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(scheduler: Any, model: Any = None, dtype: torch.dtype = torch.float16) -> Any:
    """Stable Diffusion 3 Medium without text encoders (stabilityai/stable-diffusion-3-medium-diffusers, transformer/config.json)."""
    with torch.device("meta"):
        transformer = model or _cast(
            diffusers.SD3Transformer2DModel(
                sample_size=128,
                patch_size=2,
                in_channels=16,
                out_channels=16,
                num_layers=24,
                attention_head_dim=64,
                num_attention_heads=24,
                joint_attention_dim=4096,
                caption_projection_dim=1536,
                pooled_projection_dim=2048,
                pos_embed_max_size=192,
            ),
            dtype,
        )
        vae = _cast(diffusers.AutoencoderKL(**{**_VAE, "latent_channels": 16}), dtype)
    names = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    parts: dict[str, Any] = {"vae": vae, "transformer": transformer, "scheduler": scheduler, **dict.fromkeys(names)}
    pipe: Any = diffusers.StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cast(model: Any, dtype: torch.dtype) -> Any:
    return torch.nn.Module.to(
        model, dtype
    ).eval()  # diffusers' own `to` warns about layers that these models do not have
