"""Pictures, and the tiny autoencoders that encode them."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
from PIL import Image

from tests.families.tiny import (
    seeded,
)


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def qwen_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )


def wan_vae() -> Any:
    return seeded(lambda: diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1))


def ltx_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        )
    )


def image_vae(channels: int = 4) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=(2,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=channels,
            norm_num_groups=1,
            shift_factor=0.0,
        )
    )
