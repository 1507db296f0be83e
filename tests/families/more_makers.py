"""Tiny pipelines of further families, and their networks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from tests import pipelines
from tests.families.pictures import qwen_vae, wan_vae
from tests.families.tiny import (
    embeds,
    euler,
    parts,
    qwen,
    seeded,
    wan,
)


def small_qwen(name: str, **given: Any) -> Callable[[], Any]:
    """The pipelines that scale pictures to a million pixels; here to 32 x 32."""

    def make() -> Any:
        module: Any = sys.modules[getattr(diffusers, name).__module__]
        size = module.calculate_dimensions(32 * 32, 1.0)
        module.calculate_dimensions = lambda area, ratio: size
        return qwen(name, vae=qwen_vae, **given)()

    return make


def wan_i2v() -> Any:
    pipe = wan("WanImageToVideoPipeline", in_channels=36)()
    return parts(
        diffusers.WanImageToVideoPipeline, transformer=pipe.transformer, scheduler=pipe.scheduler, vae=wan_vae()
    )


def hidream() -> Any:
    transformer = seeded(
        lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 16],
            text_emb_dim=64,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        )
    )
    pipe = parts(diffusers.HiDreamImagePipeline, transformer=transformer, scheduler=euler())
    pipe.default_sample_size = 8  # its latents have this size whatever it is asked for
    return pipe


def lumina2() -> Any:
    transformer = seeded(
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=8,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=1,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=8,
        )
    )
    return parts(diffusers.Lumina2Pipeline, transformer=transformer, scheduler=euler())


def krea2() -> Any:
    transformer = seeded(
        lambda: diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 6, 6),
        )
    )
    return parts(diffusers.Krea2Pipeline, transformer=transformer, scheduler=euler(), text_encoder_select_layers=(1, 2))


def cogview4(name: str = "CogView4Pipeline", channels: int = 4, **extra: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=channels,
            out_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=4,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(256, 256),
        )
    )
    return parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), **extra)


def cogview3() -> Any:
    transformer = seeded(
        lambda: diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=8,
            sample_size=8,
        )
    )
    scheduler = diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return parts(diffusers.CogView3PlusPipeline, transformer=transformer, scheduler=scheduler)


def hunyuan_video() -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        )
    )
    return parts(diffusers.HunyuanVideoPipeline, transformer=transformer, scheduler=euler())


def mochi() -> Any:
    transformer = seeded(
        lambda: diffusers.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=32,
            time_embed_dim=4,
            max_sequence_length=16,
        )
    )
    return parts(diffusers.MochiPipeline, transformer=transformer, scheduler=euler())


def ovis() -> Any:
    transformer = seeded(
        lambda: diffusers.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 8),
        )
    )
    return parts(diffusers.OvisImagePipeline, transformer=transformer, scheduler=euler())


def cascade() -> Any:
    prior = seeded(
        lambda: diffusers.models.StableCascadeUNet(
            conditioning_dim=16,
            block_out_channels=(16, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_image_in_channels=16,
            clip_text_in_channels=16,
            clip_text_pooled_in_channels=16,
            dropout=(0.0, 0.0),
            self_attn=False,
            switch_level=(False,),
        )
    )
    return parts(
        diffusers.StableCascadePriorPipeline,
        prior=prior,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        text_encoder=pipelines.text_encoder(projection=True),  # asked for its dtype
    )


def masked(
    seed: int, width: int, length: int = 7, mask: str = "prompt_attention_mask", dtype: Any = None, batch: int = 2
) -> dict[str, Any]:
    ones = torch.ones(batch, length, dtype=dtype or torch.float32)
    return {**embeds(seed, prompt_embeds=(batch, length, width)), mask: ones}


def unet(name: str, make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: parts(getattr(diffusers, name), unet=seeded(make), vae=pipelines.vae(), scheduler=pipelines.ddim())


def motion_unet(**config: Any) -> Any:
    return diffusers.UNetMotionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=8,
        num_attention_heads=2,
        norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        **config,
    )
