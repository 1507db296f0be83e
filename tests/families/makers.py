"""Tiny pipelines and their networks: the first fifteen families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tests.families.instance import euler, parts, seeded


def flux_transformer(**config: Any) -> Any:
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (4, 4, 8),
                **config,
            }
        )
    )


def flux(name: str = "FluxPipeline", **extra: Any) -> Callable[[], Any]:
    return lambda: parts(
        getattr(diffusers, name),
        transformer=flux_transformer(),
        scheduler=euler(),
        **{k: v() for k, v in extra.items()},
    )


def qwen(name: str = "QwenImagePipeline", config: Any = None, **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = seeded(
            lambda: diffusers.QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(8, 4, 4),
                **(config or {}),
            )
        )
        return parts(
            getattr(diffusers, name), transformer=transformer, scheduler=euler(), **{k: v() for k, v in extra.items()}
        )

    return make


def wan_transformer(seed: int = 0, **config: Any) -> Any:
    return seeded(
        lambda: diffusers.WanTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 32,
                "freq_dim": 32,
                "ffn_dim": 32,
                "num_layers": 1,
                "rope_max_seq_len": 32,
                **config,
            }
        ),
        seed,
    )


def wan(name: str = "WanPipeline", *, boundary: float | None = None, scheduler: Any = euler, **config: Any) -> Any:
    def make() -> Any:
        extra = {"transformer_2": wan_transformer(1, **config), "boundary_ratio": boundary} if boundary else {}
        return parts(getattr(diffusers, name), transformer=wan_transformer(**config), scheduler=scheduler(), **extra)

    return make


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def z_image_transformer(**config: Any) -> Any:
    return seeded(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
            **config,
        )
    )


def z_image() -> Any:
    return parts(diffusers.ZImagePipeline, transformer=z_image_transformer(), scheduler=euler())


def klein() -> Any:
    transformer = seeded(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
    )
    vae = diffusers.AutoencoderKLFlux2(  # read for its latents' statistics even where latents are returned
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=32,
    )
    return parts(diffusers.Flux2KleinPipeline, transformer=transformer, scheduler=euler(), vae=vae.eval())


def chroma() -> Any:
    transformer = seeded(
        lambda: diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )
    return parts(diffusers.ChromaPipeline, transformer=transformer, scheduler=euler())


def sana() -> Any:
    transformer = seeded(
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
        )
    )
    return parts(
        diffusers.SanaPipeline, transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(flow_shift=3.0)
    )


def ltx(name: str = "LTXPipeline", **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = seeded(
            lambda: diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                cross_attention_dim=16,
                num_layers=1,
                caption_channels=16,
            )
        )
        return parts(
            getattr(diffusers, name), transformer=transformer, scheduler=euler(), **{k: v() for k, v in extra.items()}
        )

    return make


def cogvideox(scheduler: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = seeded(
            lambda: diffusers.CogVideoXTransformer3DModel(
                **{"in_channels": 4, **config},
                num_attention_heads=2,
                attention_head_dim=8,
                out_channels=4,
                time_embed_dim=2,
                text_embed_dim=16,
                num_layers=1,
                sample_width=4,
                sample_height=4,
                sample_frames=9,
                patch_size=2,
                temporal_compression_ratio=4,
                max_text_seq_length=8,
            )
        )
        made = getattr(diffusers, scheduler)(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        return parts(diffusers.CogVideoXPipeline, transformer=transformer, scheduler=made)

    return make


def auraflow() -> Any:
    transformer = seeded(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            out_channels=4,
            pos_embed_max_size=64,
        )
    )
    return parts(diffusers.AuraFlowPipeline, transformer=transformer, scheduler=euler())
