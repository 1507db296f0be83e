"""Tiny random instances of the pipelines that are guided by a guider."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from PIL import Image

from tests.families.tiny import embeds, euler, parts, seeded

STEPS = 4
MASKED = {"prompt_embeds": (2, 6, 16), "prompt_embeds_2": (2, 5, 16)}


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()


def hunyuan_video(name: str = "HunyuanVideo15Pipeline") -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=8,
            rope_axes_dim=(2, 2, 4),
            target_size=32,
            task_type="t2v",
        )
    )
    pipe = parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), vae=hunyuan_vae())
    pipe.vision_num_semantic_tokens = 3
    return pipe


def hunyuan_video_image() -> Any:
    pipe = hunyuan_video("HunyuanVideo15ImageToVideoPipeline")
    image_embeds = embeds(9, image_embeds=(2, 3, 8))["image_embeds"]
    pipe.encode_image = lambda **_: image_embeds
    return pipe


def hunyuan_image(name: str = "HunyuanImagePipeline", channels: int = 4, **config: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=channels,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            **{"text_embed_2_dim": 16, "rope_axes_dim": (4, 4), **config},
        )
    )
    return parts(getattr(diffusers, name), transformer=transformer, scheduler=euler())


def refiner() -> Any:
    return hunyuan_image(
        "HunyuanImageRefinerPipeline",
        channels=8,
        text_embed_2_dim=None,
        rope_axes_dim=(2, 2, 4),
        patch_size=(1, 1, 1),
        guidance_embeds=True,
    )


def motif(name: str = "MotifVideoPipeline") -> Any:
    if not hasattr(transformers, "T5Gemma2Encoder"):
        pytest.skip("MotifVideo needs a newer transformers than the lowest")
    transformer = seeded(
        lambda: diffusers.MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(2, 2, 4),
        )
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), vae=vae.eval())


def motif_image() -> Any:
    """One picture's condition for both prompts: the pipeline makes it for one, and repeats it only for several videos of a prompt."""
    pipe = motif("MotifVideoImage2VideoPipeline")
    prepare = pipe._prepare_first_frame_conditioning

    def for_both(*given: Any, **named: Any) -> Any:
        condition, mask, image_embeds = prepare(*given, **named)
        return condition.repeat(2, 1, 1, 1, 1), mask, image_embeds

    pipe._prepare_first_frame_conditioning = for_both
    return pipe


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, Any]
    elements: int
    mask: str = "prompt_embeds_mask"  # of "prompt_embeds"; that of "prompt_embeds_2" ends as it does


CASES = {
    "hunyuan-video 1.5": Case(hunyuan_video, MASKED, {"height": 32, "width": 32, "num_frames": 5}, 4 * 2 * 4 * 4),
    "hunyuan-video 1.5, image": Case(
        hunyuan_video_image,
        MASKED,
        {"image": Image.new("RGB", (32, 32), (200, 40, 90)), "num_frames": 5},
        4 * 2 * 4 * 4,
    ),
    "hunyuan-image": Case(hunyuan_image, MASKED, {"height": 256, "width": 256}, 4 * 8 * 8),
    "hunyuan-image refiner": Case(
        refiner,
        {"prompt_embeds": (2, 6, 16)},
        {"height": 64, "width": 64, "image": torch.ones(2, 4, 1, 4, 4)},
        4 * 4 * 4,
    ),
    "motif": Case(
        motif,
        {"prompt_embeds": (2, 6, 16)},
        {"height": 32, "width": 32, "num_frames": 5},
        4 * 2 * 4 * 4,
        mask="prompt_attention_mask",
    ),
    "motif, image": Case(
        motif_image,
        {"prompt_embeds": (2, 6, 16)},
        {
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "prompt": None,
            "image": Image.new("RGB", (32, 32), (200, 40, 90)),
        },
        4 * 2 * 4 * 4,
        mask="prompt_attention_mask",
    ),
}


def branch(case: Case, seed: int, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, tensor in embeds(seed, **case.shapes).items():
        end = name.removeprefix("prompt_embeds")
        found[f"{prefix}{name}"] = tensor
        found[f"{prefix}{case.mask}{end}"] = torch.ones(tensor.shape[:2], dtype=torch.int64)
    return found


def arguments(case: Case) -> dict[str, Any]:
    return {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "return_dict": False,
        "generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)],
        **case.fixed,
        **branch(case, 1),
        **branch(case, 2, "negative_"),
    }
