"""Tiny instances of recent image pipelines that are alone in their family, or nearly so."""

from __future__ import annotations

import sys
import types
from typing import Any

import diffusers
import torch

from tests.families.more import GUIDED, image_vae, masked, picture, wan_vae
from tests.families.recent_bria import two_prompts, words
from tests.families.tiny import SQUARE, Tiny, embeds, euler, parts, seeded


def ernie() -> Any:
    transformer = seeded(
        lambda: diffusers.ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=1,
            ffn_hidden_size=32,
            in_channels=4,
            out_channels=4,
            text_in_dim=16,
            rope_axes_dim=(4, 4, 8),
        )
    )
    return parts(diffusers.ErnieImagePipeline, transformer=transformer, scheduler=euler())


def prx() -> Any:
    transformer = seeded(
        lambda: diffusers.PRXTransformer2DModel(
            in_channels=4,
            context_in_dim=16,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            axes_dim=[4, 4],
        )
    )
    return parts(diffusers.PRXPipeline, transformer=transformer, scheduler=euler())


def longcat(name: str = "LongCatImagePipeline", **extra: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        )
    )
    pipe = parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), **extra)

    def encode(self: Any, prompt: list[str], image: Any = None) -> torch.Tensor:
        return words(prompt, 6, 16).to(self.dtype)

    pipe._encode_prompt = types.MethodType(encode, pipe)  # of a copy, where the pipeline is copied
    return pipe


class Processor:
    """Of the text encoder, which is left out."""

    image_processor = None


def longcat_edit() -> Any:
    module: Any = sys.modules[diffusers.LongCatImageEditPipeline.__module__]
    module.calculate_dimensions = lambda area, ratio: (32, 32)
    return longcat("LongCatImageEditPipeline", vae=image_vae(16), text_processor=Processor())


def nucleus() -> Any:
    transformer = seeded(
        lambda: diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            dense_moe_strategy="all_moe",
            num_experts=2,
            moe_intermediate_dim=16,
            capacity_factors=1.0,
        )
    )
    for parameter in transformer.transformer_blocks[0].img_mlp.experts.parameters():  # left as they were in memory
        torch.nn.init.normal_(parameter, std=0.1)
    return parts(diffusers.NucleusMoEImagePipeline, transformer=transformer, scheduler=euler())


def kandinsky5(name: str = "Kandinsky5T2IPipeline", **extra: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=1,
            axes_dims=(4, 6, 6),
            visual_cond=bool(extra),
        )
    )
    pipe = parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), **extra)
    pipe.resolutions = [(32, 32)]  # it makes these alone
    return pipe


def kandinsky5_prompt(seed: int) -> dict[str, Any]:
    length = 4 + seed
    given = embeds(seed, prompt_embeds_qwen=(2, length, 16), prompt_embeds_clip=(2, 8))
    return {**given, "prompt_cu_seqlens": torch.tensor([0, length, 2 * length], dtype=torch.int32)}


def glm() -> Any:
    transformer = seeded(
        lambda: diffusers.GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=8,
        )
    )
    vae = image_vae()
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return parts(diffusers.GlmImagePipeline, transformer=transformer, scheduler=euler(), vae=vae)


def joy() -> Any:
    transformer = seeded(
        lambda: diffusers.JoyImageEditTransformer3DModel(
            in_channels=16,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=1.0,
            num_layers=1,
            rope_dim_list=[4, 6, 6],
        )
    )
    pipe = parts(diffusers.JoyImageEditPipeline, transformer=transformer, scheduler=euler(), vae=wan_vae())
    pipe.vae_image_processor.get_default_height_width = lambda *_: (32, 32)  # it makes pictures of a million pixels
    return pipe


TWO = [picture(), picture(1)]

SINGLE: dict[str, Tiny] = {
    "ernie": Tiny(
        ernie,
        lambda seed: {"prompt_embeds": list(embeds(seed, prompt_embeds=(2, 5 + seed, 16))["prompt_embeds"])},
        fixed=SQUARE,
        elements=4 * 2 * 2,
        exact=False,
        **GUIDED,
    ),
    "prx": Tiny(
        prx,
        lambda seed: masked(seed, 16, dtype=torch.bool, batch=1),
        fixed={**SQUARE, "use_resolution_binning": False},
        elements=4 * 4 * 4,
        images=1,  # guided, it gives the model two timesteps, however many images there are
        exact=False,
        **GUIDED,
    ),
    "longcat": Tiny(
        longcat,
        two_prompts,
        fixed={**SQUARE, "enable_prompt_rewrite": False},
        elements=4 * 64,
        bends=True,
        **GUIDED,
    ),
    "longcat edit": Tiny(
        longcat_edit,
        lambda seed: {"prompt": [f"{seed} a"]},
        fixed={"image": picture()},
        elements=4 * 64,
        kept=(0, 4),
        images=1,
        **GUIDED,
    ),
    "nucleus": Tiny(
        nucleus,
        lambda seed: masked(seed, 16, length=5 + seed, mask="prompt_embeds_mask", dtype=torch.int64),
        fixed=SQUARE,
        elements=4 * 16,
        bends=True,
        **GUIDED,
    ),
    "kandinsky 5": Tiny(kandinsky5, kandinsky5_prompt, fixed=SQUARE, elements=4 * 4 * 4, **GUIDED),
    "kandinsky 5 i2i": Tiny(
        lambda: kandinsky5("Kandinsky5I2IPipeline", vae=image_vae()),
        kandinsky5_prompt,
        fixed={**SQUARE, "image": TWO},
        elements=4 * 4 * 4,
        **GUIDED,
    ),
    "glm": Tiny(
        glm,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16)),
        fixed={**SQUARE, "prior_token_ids": torch.arange(8).reshape(2, 4)},
        elements=4 * 4 * 4,
        full_rows=4,  # no call is left out: so c is u + (c - u), but for the last bits
        exact=False,
        besides={"transformer": ("prior_token_drop",)},  # the negative branch does not see them
        **GUIDED,
    ),
    "joy edit": Tiny(
        joy,
        lambda seed: masked(seed, 16, mask="prompt_embeds_mask", dtype=torch.int64),
        fixed={"image": TWO},
        elements=2 * 16 * 4 * 4,
        bends=True,
        **GUIDED,
    ),
}
