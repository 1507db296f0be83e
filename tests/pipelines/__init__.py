"""Tiny random pipelines of every family, built here: real diffusers classes, real tokenizers, no download."""

from __future__ import annotations

import functools
import string
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def ddim(**config: Any) -> diffusers.DDIMScheduler:
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**BETAS, **{**defaults, **config})


@functools.lru_cache(maxsize=1)
def tokenizer() -> CLIPTokenizer:
    letters = [*string.ascii_lowercase, *string.digits, *",.!-*<>_"]
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_encoder(projection: bool = False, seed: int = 0) -> CLIPTextModel | CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=32,
        vocab_size=len(tokenizer()),
        max_position_embeddings=16,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(latent_channels: int = 4) -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=8,
        shift_factor=0.0 if latent_channels == 16 else None,
    ).eval()


def unet(in_channels: int = 4, **config: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(2)
    defaults: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**{**defaults, **config}).eval()


def controlnet(**config: Any) -> diffusers.ControlNetModel:
    torch.manual_seed(3)
    model = diffusers.ControlNetModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=config.pop("cross_attention_dim", 32),
        conditioning_embedding_out_channels=(16, 32),
        attention_head_dim=8,
        norm_num_groups=4,
        **config,
    ).eval()
    for parameter in model.controlnet_down_blocks.parameters():  # zero convolutions would hide a wrong residual
        torch.nn.init.normal_(parameter, std=0.1)
    return model


XL_UNET: dict[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 80,  # 6 * 8 + 32
    "cross_attention_dim": 64,
}


def controlnet_union(**config: Any) -> Any:
    torch.manual_seed(3)
    model = diffusers.ControlNetUnionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(16, 32),
        attention_head_dim=8,
        norm_num_groups=4,
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
        **config,
    ).eval()
    for parameter in [*model.controlnet_down_blocks.parameters(), *model.spatial_ch_projs.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def sd(kind: str = "StableDiffusionPipeline", scheduler: Any = None, **components: Any) -> Any:
    """Stable Diffusion 1.x/2.x of the named pipeline class."""
    parts: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": vae(),
        "unet": unet(),
        "scheduler": scheduler or ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if "ControlNet" in kind:
        parts["controlnet"] = controlnet()
    return _quiet(getattr(diffusers, kind)(**{**parts, **components}))


def sdxl(kind: str = "StableDiffusionXLPipeline", scheduler: Any = None, **components: Any) -> Any:
    """SDXL of the named pipeline class."""
    parts: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "text_encoder": text_encoder(),
        "text_encoder_2": text_encoder(projection=True, seed=5),
        "vae": vae(),
        "unet": unet(**XL_UNET),
        "scheduler": scheduler or diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1),
    }
    if "ControlNet" in kind:
        parts["controlnet"] = (controlnet_union if "Union" in kind else controlnet)(**XL_UNET)
    return _quiet(getattr(diffusers, kind)(**{**parts, **components}))


def sd3(kind: str = "StableDiffusion3Pipeline", scheduler: Any = None, **components: Any) -> Any:
    """Stable Diffusion 3 without its third text encoder."""
    torch.manual_seed(4)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=96,
        pooled_projection_dim=64,
    ).eval()
    parts: dict[str, Any] = {
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": None,
        "text_encoder": text_encoder(projection=True),
        "text_encoder_2": text_encoder(projection=True, seed=5),
        "text_encoder_3": None,
        "vae": vae(16),
        "transformer": transformer,
        "scheduler": scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return _quiet(getattr(diffusers, kind)(**{**parts, **components}))


def pixart(scheduler: Any = None, kind: str = "PixArtAlphaPipeline") -> Any:
    """PixArt with a learned variance, without its text encoder: pass `pixart_embeds()`."""
    torch.manual_seed(6)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_num_groups=1,
        use_additional_conditions=False,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)  # zero by default, which predicts nothing
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
    return _quiet(
        getattr(diffusers, kind)(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=transformer,
            scheduler=scheduler,
        )
    )


def pixart_embeds(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    embeds = {
        name: torch.randn(batch, 8, 32, generator=generator) for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    masks = {f"{name.removesuffix('embeds')}attention_mask": torch.ones(batch, 8) for name in embeds}
    return {**embeds, **masks}


def image_encoder() -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """For IP-Adapter."""
    torch.manual_seed(8)
    config = CLIPVisionConfig(
        hidden_size=32, image_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
        patch_size=8, projection_dim=32,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval(), CLIPImageProcessor(crop_size=32, size=32)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
