"""Kind B: one denoiser call a row for both branches, combined by the pipeline."""

from __future__ import annotations

from typing import Any

import torch

from fastguard.pipelines.families.own import OwnFamily

RESCALE = "guidance_rescale (optional)"


def _one(name: str, *pipelines: str, **facts: Any) -> OwnFamily:
    return OwnFamily(name=name, pipelines=pipelines, **facts)


def _squeezed(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    return output.squeeze(2)  # one frame


def _unpacked_video(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    """Tokens to [B, C, F, H, W] without the first frame, which is the user's."""
    unpacked = pipe._unpack_latents(
        output,
        given["num_frames"],
        given["height"],
        given["width"],
        pipe.transformer_spatial_patch_size,
        pipe.transformer_temporal_patch_size,
    )
    return unpacked[:, :, 1:]


ONE_BATCH: tuple[OwnFamily, ...] = (
    _one(
        "z-image",
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageOmniPipeline",
        order=("cond", "uncond"),
        sign=-1,
        to_step=_squeezed,
        live=True,
        offset=1.0,
        nonlinear="cfg_normalization: the norm is clamped, image by image",
        second_branch="pass guidance_scale above 0 to a model that is not distilled (Turbo is run with 0)",
    ),
    _one("sana", "SanaPipeline", "SanaControlNetPipeline", "SanaVideoPipeline"),
    _one("hidream", "HiDreamImagePipeline", sign=-1, live=True),
    _one("ltx", "LTXPipeline", live=True, nonlinear=RESCALE),
    _one("ltx, conditioned", "LTXConditionPipeline", sign=-1, live=True, nonlinear=RESCALE),
    _one("ltx, image to video", "LTXImageToVideoPipeline", to_step=_unpacked_video, live=True, nonlinear=RESCALE),
    _one(
        "cogvideox",
        "CogVideoXPipeline",
        "CogVideoXFunControlPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "ConsisIDPipeline",
        live=True,
    ),
    _one("auraflow", "AuraFlowPipeline"),
    _one("mochi", "MochiPipeline", live=True),
    _one("allegro", "AllegroPipeline"),
    _one("latte", "LattePipeline"),
    _one("cogview 3", "CogView3PlusPipeline", live=True),
)
