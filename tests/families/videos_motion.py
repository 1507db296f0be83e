"""Tiny instances of AnimateDiff's relatives, and of Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers

from tests import pipelines
from tests.families.more import GUIDED, another, motion_unet, picture, unet
from tests.families.tiny import SQUARE, Tiny, embeds, parts, seeded

BLOCKS: dict[str, Any] = {  # of a controlnet that fits `motion_unet`
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
    "conditioning_embedding_out_channels": (8, 8),
}
CLIPS = [[picture(3 * video + frame) for frame in range(2)] for video in range(2)]  # one for each prompt
EDGES = [[picture(9 + 3 * video + frame) for frame in range(2)] for video in range(2)]


def controlnet() -> Any:
    return seeded(
        lambda: diffusers.ControlNetModel(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), **BLOCKS), 3
    )


def sparse_controlnet() -> Any:
    return seeded(
        lambda: diffusers.SparseControlNetModel(
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            conditioning_channels=3,
            use_simplified_condition_embedding=False,
            motion_max_seq_length=8,
            motion_num_attention_heads=2,
            **BLOCKS,
        ),
        3,
    )


def motion_unet_xl() -> Any:
    return motion_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    )


def stable_video_diffusion() -> Any:
    unet = seeded(
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            num_attention_heads=2,
            cross_attention_dim=16,
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=3 * 4,
        )
    )
    vae = seeded(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
        )
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, projection_dim=16,
        image_size=224, patch_size=112,
    )  # fmt: skip
    return parts(
        diffusers.StableVideoDiffusionPipeline,
        unet=unet,
        vae=vae,
        image_encoder=seeded(lambda: transformers.CLIPVisionModelWithProjection(vision)),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=224, size=224),
        scheduler=diffusers.EulerDiscreteScheduler(
            **pipelines.BETAS, prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous"
        ),
    )


_VIDEO = {"video": CLIPS, "strength": 1.0, "num_frames": None}
MOTION: dict[str, Tiny] = {
    "animatediff controlnet": another(
        "animatediff",
        "AnimateDiffControlNetPipeline",
        {"conditioning_frames": EDGES, "num_frames": 2},
        parts={"controlnet": controlnet},
        elements=4 * 2 * 16 * 16,
    ),
    "animatediff sparse": another(
        "animatediff",
        "AnimateDiffSparseControlNetPipeline",
        {"conditioning_frames": [picture(9)], "controlnet_frame_indices": [1]},
        parts={"controlnet": sparse_controlnet},
    ),
    "animatediff v2v": another("animatediff", "AnimateDiffVideoToVideoPipeline", _VIDEO, elements=4 * 2 * 16 * 16),
    "animatediff v2v controlnet": another(
        "animatediff",
        "AnimateDiffVideoToVideoControlNetPipeline",
        {**_VIDEO, "conditioning_frames": EDGES},
        parts={"controlnet": controlnet},
        elements=4 * 2 * 16 * 16,
    ),
    "animatediff xl": Tiny(
        unet("AnimateDiffSDXLPipeline", motion_unet_xl),
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 8), pooled_prompt_embeds=(2, 8)),
        fixed={**SQUARE, "num_frames": 3},
        elements=4 * 3 * 16 * 16,
        exact=False,
        **GUIDED,
    ),
    "stable video diffusion": Tiny(
        stable_video_diffusion,
        lambda seed: {"image": [picture(), picture(1)]},
        shared=("image",),
        on={"max_guidance_scale": 4.0, "min_guidance_scale": 4.0},
        off={"max_guidance_scale": 1.0},
        fixed={"height": 16, "width": 16, "num_frames": 2, "return_dict": True},
        elements=2 * 4 * 8 * 8,
        exact=False,
        counts_steps=False,
        no_negative="zeros instead of the picture's embeddings and latents",
    ),
}
