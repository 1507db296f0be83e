"""More tiny instances: pipelines that take a picture, and families beyond the first ones."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tests import pipelines
from tests.families.tiny import (
    CASES,
    SQUARE,
    VIDEO,
    Tiny,
    embeds,
    euler,
    flux,
    ltx,
    parts,
    qwen,
    seeded,
    unipc,
    wan,
)


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def small_qwen(name: str, **given: Any) -> Callable[[], Any]:
    """The pipelines that scale pictures to a million pixels; here to 32 x 32."""

    def make() -> Any:
        module: Any = sys.modules[getattr(diffusers, name).__module__]
        size = module.calculate_dimensions(32 * 32, 1.0)
        module.calculate_dimensions = lambda area, ratio: size
        return qwen(name, vae=qwen_vae, **given)()

    return make


def qwen_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )


def wan_vae() -> Any:
    return seeded(lambda: diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1))


def wan_i2v() -> Any:
    pipe = wan("WanImageToVideoPipeline", in_channels=36)()
    return parts(
        diffusers.WanImageToVideoPipeline, transformer=pipe.transformer, scheduler=pipe.scheduler, vae=wan_vae()
    )


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


GUIDED: dict[str, Any] = {"on": {"guidance_scale": 4.0}, "off": {"guidance_scale": 1.0}}
TRUE_CFG: dict[str, Any] = {"on": {"true_cfg_scale": 4.0}, "off": {"true_cfg_scale": 1.0}}
QWEN: dict[str, Any] = {**TRUE_CFG, "bends": True, "elements": 4 * 16}

MORE: dict[str, Tiny] = {
    "kontext": Tiny(
        flux("FluxKontextPipeline", vae=image_vae),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32), pooled_prompt_embeds=(2, 32)),
        **TRUE_CFG,
        fixed={**SQUARE, "max_area": 32 * 32, "image": picture(), "_auto_resize": False},
        elements=4 * 16,
        kept=(0, 4),
    ),
    "qwen edit": Tiny(
        small_qwen("QwenImageEditPipeline"),
        lambda seed: masked(seed, 16, mask="prompt_embeds_mask", dtype=torch.int64),
        fixed={**SQUARE, "image": picture()},
        kept=(0, 4),
        **QWEN,
    ),
    "qwen edit plus": Tiny(
        small_qwen("QwenImageEditPlusPipeline"),
        lambda seed: masked(seed, 16, mask="prompt_embeds_mask", dtype=torch.int64, batch=1),
        fixed={**SQUARE, "image": [picture(), picture(1)]},
        kept=(0, 4),
        images=1,
        **QWEN,
    ),
    "wan i2v": Tiny(
        wan_i2v,
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        fixed={**VIDEO, "image": picture()},
        elements=16 * 2 * 4 * 4,
        **GUIDED,
    ),
    "ltx i2v": Tiny(
        ltx("LTXImageToVideoPipeline", vae=ltx_vae),
        lambda seed: masked(seed, 16, dtype=torch.int64),
        fixed={"height": 32, "width": 32, "num_frames": 9, "image": [picture(), picture(1)]},
        elements=8 * 2 * 8 * 8,
        kept=(64, None),  # without the first frame
        exact=False,
        **GUIDED,
    ),
    "hidream": Tiny(
        hidream,
        lambda seed: embeds(
            seed, prompt_embeds_t5=(2, 8, 32), prompt_embeds_llama3=(2, 2, 8, 16), pooled_prompt_embeds=(2, 64)
        ),
        fixed=SQUARE,
        elements=4 * 8 * 8,
        exact=False,
        **GUIDED,
    ),
    "lumina 2": Tiny(
        lumina2,
        lambda seed: masked(seed, 8, dtype=torch.bool),
        fixed={**SQUARE, "cfg_normalization": True},
        elements=4 * 4 * 4,
        bends=True,
        **GUIDED,
    ),
    "krea 2": Tiny(
        krea2,
        lambda seed: {
            "prompt_embeds": embeds(seed, prompt_embeds=(2, 6, 2, 16))["prompt_embeds"],
            "prompt_embeds_mask": torch.ones(2, 6, dtype=torch.bool),
        },
        on={"guidance_scale": 3.0},
        off={"guidance_scale": 0.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "cogview 4": Tiny(
        cogview4,
        lambda seed: embeds(seed, prompt_embeds=(2, 16, 32)),
        fixed=SQUARE,
        elements=4 * 4 * 4,
        **GUIDED,
    ),
    "cogview 3": Tiny(
        cogview3,
        # without a negative_prompt the pipeline takes zeros, whatever embeddings it is given
        lambda seed: {"prompt_embeds": (seed == 1) * embeds(seed, prompt_embeds=(2, 8, 32))["prompt_embeds"]},
        fixed=SQUARE,
        elements=4 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "hunyuan video": Tiny(
        hunyuan_video,
        lambda seed: {**masked(seed, 16), **embeds(seed + 9, pooled_prompt_embeds=(2, 8))},
        fixed=VIDEO,
        elements=4 * 2 * 4 * 4,
        **TRUE_CFG,
    ),
    "mochi": Tiny(
        mochi,
        lambda seed: masked(seed, 32, length=16, dtype=torch.bool),
        fixed={"height": 32, "width": 32, "num_frames": 7},
        elements=12 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "ovis": Tiny(
        ovis,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16)),
        fixed={**SQUARE, "negative_prompt": None},
        elements=4 * 16,
        **GUIDED,
    ),
    "cascade prior": Tiny(
        cascade,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16), prompt_embeds_pooled=(2, 1, 16)),
        fixed={"height": 128, "width": 128},
        elements=16 * 3 * 3,
        counts_steps=False,
        exact=False,
        **GUIDED,
    ),
}


def another(base: str, name: str, given: dict[str, Any] | None = None, **changes: Any) -> Tiny:
    """The same parts and more in the pipeline class `name`, with more arguments (None: without one); changes: of the instance."""
    first = {**CASES, **MORE}[base]
    extra, fixed = changes.pop("parts", {}), {**first.fixed, **(given or {})}

    def make() -> Any:
        kind = getattr(diffusers, name)
        found = {**first.make().components, **{part: one() for part, one in extra.items()}}
        return parts(kind, **{k: v for k, v in found.items() if k in inspect.signature(kind.__init__).parameters})

    fixed = {key: value for key, value in fixed.items() if value is not None}
    return dataclasses.replace(first, make=make, fixed=fixed, **changes)


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


_TWO = [picture(), picture(1)]
_FROM: dict[str, Any] = {"image": _TWO, "strength": 1.0}
_INTO: dict[str, Any] = {**_FROM, "mask_image": [picture(5)] * 2}
_VIDEO = {"video": [picture(k) for k in range(5)], "num_frames": None}
_VAE: dict[str, Any] = {"vae": image_vae}
_QWEN_VAE: dict[str, Any] = {"vae": qwen_vae}
_WAN_VAE: dict[str, Any] = {"vae": wan_vae, "scheduler": unipc}

MORE |= {
    "kolors": Tiny(
        unet("KolorsPipeline", lambda: pipelines.unet(**pipelines.XL_UNET)),
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 64), pooled_prompt_embeds=(2, 32)),
        fixed=SQUARE,
        elements=4 * 16 * 16,
        exact=False,
        **GUIDED,
    ),
    "animatediff": Tiny(
        unet("AnimateDiffPipeline", motion_unet),
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 8)),
        fixed={**SQUARE, "num_frames": 3},
        elements=4 * 3 * 16 * 16,
        exact=False,
        **GUIDED,
    ),
    "flux i2i": another("flux", "FluxImg2ImgPipeline", _FROM, parts=_VAE),
    "flux inpaint": another("flux", "FluxInpaintPipeline", _INTO, parts=_VAE),
    "kontext inpaint": another("kontext", "FluxKontextInpaintPipeline", {"mask_image": [picture(5)], "strength": 1.0}),
    "chroma i2i": another("chroma", "ChromaImg2ImgPipeline", _FROM, parts=_VAE),
    "qwen i2i": another("qwen", "QwenImageImg2ImgPipeline", _FROM, parts=_QWEN_VAE),
    "qwen inpaint": another("qwen", "QwenImageInpaintPipeline", _INTO, parts=_QWEN_VAE),
    "z-image i2i": another("z-image", "ZImageImg2ImgPipeline", _FROM, parts={"vae": lambda: image_vae(16)}),
    "klein inpaint": another(
        "klein",
        "Flux2KleinInpaintPipeline",
        {"image": picture(), "mask_image": picture(5), "strength": 1.0},
        kept=(0, 4),
    ),
    "wan v2v": another("wan", "WanVideoToVideoPipeline", {**_VIDEO, "strength": 1.0}, parts=_WAN_VAE),
    "skyreels": another("wan", "SkyReelsV2Pipeline", parts={"scheduler": unipc}),
    "ltx condition": another("ltx", "LTXConditionPipeline", parts={"vae": ltx_vae}, elements=8 * 3 * 16 * 16),
}
