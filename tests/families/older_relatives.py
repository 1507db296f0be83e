"""Tiny instances of Stable Diffusion's relatives: adapters, depth, upscaling, pictures as prompts, latent diffusion."""

from __future__ import annotations

import types
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from tests import pipelines
from tests.families.more import GUIDED, image_vae, picture
from tests.families.tiny import SQUARE, Tiny, embeds, parts, seeded

# An adapter's features enter behind the layers of a block and before it halves the picture, so cross-attention comes first.
_ADAPTED: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def relative(name: str, unet: dict[str, Any] | None = None, **given: Any) -> Any:
    """Of the class `name`; without an autoencoder, its latents are an eighth of the picture's size."""
    return parts(
        getattr(diffusers, name),
        unet=seeded(lambda: pipelines.unet(**(unet or {}))),
        scheduler=pipelines.ddim(),
        **given,
    )


def _adapter() -> Any:
    return seeded(lambda: diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=8), 1)


def adapter() -> Any:
    return relative("StableDiffusionAdapterPipeline", _ADAPTED, adapter=_adapter(), requires_safety_checker=False)


def xl_adapter() -> Any:
    return relative("StableDiffusionXLAdapterPipeline", {**pipelines.XL_UNET, **_ADAPTED}, adapter=_adapter())


def depth() -> Any:
    return relative("StableDiffusionDepth2ImgPipeline", {"in_channels": 5}, vae=image_vae())


def variation() -> Any:
    encoder, _ = pipelines.image_encoder()
    return relative("StableDiffusionImageVariationPipeline", image_encoder=encoder, requires_safety_checker=False)


def upscale() -> Any:
    unet = {"in_channels": 7, "num_class_embeds": 1000}
    return relative(
        "StableDiffusionUpscalePipeline", unet, vae=image_vae(), low_res_scheduler=diffusers.DDPMScheduler()
    )


def unclip() -> Any:
    unet = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 64}
    encoder, _ = pipelines.image_encoder()
    return relative(
        "StableUnCLIPImg2ImgPipeline",
        unet,
        image_encoder=encoder,
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=32),
        image_noising_scheduler=diffusers.DDPMScheduler(),
    )


def latent_diffusion() -> Any:
    config = LDMBertConfig(
        vocab_size=len(pipelines.tokenizer()),
        d_model=32,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=16,
        max_position_embeddings=77,
    )
    return relative(
        "LDMTextToImagePipeline",
        vqvae=image_vae(),
        bert=seeded(lambda: LDMBertModel(config)),
        tokenizer=pipelines.tokenizer(),
    )


class _Fake(torch.nn.Module):
    """What pipelines ask of a component."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class _Questions(_Fake):
    """In the place of BLIP's Q-Former: two tokens made of a picture's mean colours."""

    config = types.SimpleNamespace(num_query_tokens=2)

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(3, 64)

    def forward(self, image_input: Any, text_input: Any, return_dict: bool) -> torch.Tensor:
        return self.project(image_input.mean((2, 3)).to(self.dtype)).view(-1, 2, 32)


class _Words(_Fake):
    """In the place of BLIP's text encoder: a word is its embedding, and the Q-Former's tokens stand before the words."""

    text_model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=16))

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(len(pipelines.tokenizer()), 32)

    def forward(self, input_ids: Any, ctx_embeddings: Any = None, ctx_begin_pos: Any = None) -> tuple[torch.Tensor]:
        words = self.words(input_ids)
        return (words if ctx_embeddings is None else torch.cat([ctx_embeddings, words], 1),)


class _Layers(_Fake):
    """In the place of Kolors' text encoder, whose layers are [length, batch, width]: the last but one are words, the last is pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(len(pipelines.tokenizer()), 64)
        self.pooled = torch.nn.Linear(64, 32)

    def forward(self, input_ids: Any, **given: Any) -> Any:
        words = self.words(input_ids).transpose(0, 1)
        pooled = self.pooled(words.cumsum(0))
        return types.SimpleNamespace(hidden_states=(words, pooled))


class _Tokenizer:
    def __call__(self, prompts: list[str], **given: Any) -> Any:
        found = pipelines.tokenizer()(prompts, **given)
        found["position_ids"] = torch.arange(found["input_ids"].shape[1]).expand_as(found["input_ids"])
        return found


def kolors_from_picture() -> Any:
    """With a text encoder: of its embeddings it takes no pooled ones."""
    return relative(
        "KolorsImg2ImgPipeline",
        pipelines.XL_UNET,
        vae=image_vae(),
        text_encoder=seeded(_Layers),
        tokenizer=_Tokenizer(),
    )


def blip() -> Any:
    return relative(
        "BlipDiffusionControlNetPipeline",
        controlnet=pipelines.controlnet(),
        vae=pipelines.vae(),
        tokenizer=pipelines.tokenizer(),
        text_encoder=seeded(_Words),
        qformer=seeded(_Questions),
        image_processor=BlipImageProcessor(size={"height": 16, "width": 16}),
    )


_TWO = [picture(0), picture(1)]
_SMALL = [picture(0, 8), picture(1, 8)]
_PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
_TEXT: dict[str, Any] = {"exact": False, "elements": 4 * 4 * 4, **GUIDED}

RELATIVES: dict[str, Tiny] = {
    "adapter": Tiny(adapter, lambda seed: embeds(seed, prompt_embeds=(2, 6, 32)), fixed={"image": _TWO}, **_TEXT),
    "adapter xl": Tiny(
        xl_adapter,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 64), pooled_prompt_embeds=(2, 32)),
        fixed={"image": _TWO},
        **_TEXT,
    ),
    "depth": Tiny(
        depth,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 32)),
        fixed={"image": _TWO, "depth_map": _PIXELS[:, 0], "strength": 1.0},
        **_TEXT,
    ),
    "variation": Tiny(
        variation,
        lambda seed: {"image": _PIXELS},
        shared=("image",),
        fixed=SQUARE,
        no_negative="zeros instead of a picture's embeddings",
        **_TEXT,
    ),
    "upscale": Tiny(
        upscale,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 32)),
        fixed={"image": _SMALL},
        **{**_TEXT, "elements": 4 * 8 * 8},
    ),
    "unclip i2i": Tiny(
        unclip,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 32)),
        fixed={**SQUARE, **embeds(3, image_embeds=(2, 32))},
        no_negative="zeros instead of a picture's embeddings, its noise level among them",
        **_TEXT,
    ),
    "latent diffusion": Tiny(
        latent_diffusion,
        lambda seed: {"prompt": ["a cat", "a red dog"] if seed == 1 else ["", ""]},
        shared=("prompt",),
        fixed={**SQUARE, "output_type": "pt"},  # it decodes whatever it is asked for
        **_TEXT,
    ),
    "blip controlnet": Tiny(
        blip,
        lambda seed: {"prompt": ["on a table", "in the snow"], "neg_prompt": "grey"},
        shared=("prompt", "neg_prompt"),
        fixed={
            "height": 16,
            "width": 16,
            "reference_image": _TWO,
            "condtioning_image": [picture(2, 16), picture(3, 16)],
            "source_subject_category": ["cat", "dog"],
            "target_subject_category": ["cat", "dog"],
            "prompt_reps": 1,
            "output_type": "pt",
        },
        no_negative="the picture's tokens are always in the prompt",
        **{**_TEXT, "elements": 4 * 8 * 8},
    ),
    "kolors i2i": Tiny(
        kolors_from_picture,
        lambda seed: {"prompt": ["a cat", "a red dog"] if seed == 1 else ["grey", "a blue sea"]},
        fixed={**SQUARE, "image": _TWO, "strength": 1.0, "max_sequence_length": 8},
        **_TEXT,
    ),
}
