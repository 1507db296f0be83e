"""Tiny instances of Kandinsky 2.1, 2.2 and 3: priors, decoders on image embeddings, ControlNet, image-to-image, inpainting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.kandinsky import MultilingualCLIP
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig

from tests import pipelines
from tests.families.more import GUIDED, picture
from tests.families.tiny import Tiny, embeds, parts, seeded


def movq() -> Any:
    """What it decodes lies within -1 and 1, where pipelines clamp."""
    model = seeded(
        lambda: diffusers.VQModel(
            block_out_channels=[32, 32],  # its spatial norm has 32 groups
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=4,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        )
    )
    for parameter in model.decoder.conv_out.parameters():
        parameter.data *= 0.1
    return model


def _text_encoder() -> Any:
    config = MCLIPConfig(
        numDims=32,
        transformerDimensions=32,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=len(pipelines.tokenizer()),
        max_position_embeddings=160,  # counted from the padding's index on
    )
    return seeded(lambda: MultilingualCLIP(config))


def _unet(name: str) -> Any:
    """Image embeddings enter in two ways: added to the timestep's, and as tokens; in 2.1 the prompt does besides."""
    kind = "text_image" if "V22" not in name else "image_hint" if "Controlnet" in name else "image"
    sees = {"image_hint": 8, "image": 4, "text_image": 4}[kind] + (5 if "Inpaint" in name else 0)  # a mask, a picture
    return seeded(
        lambda: pipelines.unet(
            in_channels=sees,
            out_channels=8,
            addition_embed_type=kind,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_image_proj" if kind == "text_image" else "image_proj",
        )
    )


def decoder(name: str) -> Callable[[], Any]:
    def make() -> Any:
        text = {} if "V22" in name else {"text_encoder": _text_encoder(), "tokenizer": pipelines.tokenizer()}
        return parts(getattr(diffusers, name), unet=_unet(name), movq=movq(), scheduler=pipelines.ddim(), **text)

    return make


def prior(name: str) -> Callable[[], Any]:
    def make() -> Any:
        model = seeded(
            lambda: diffusers.PriorTransformer(
                num_attention_heads=2, attention_head_dim=8, embedding_dim=32, num_layers=1, num_embeddings=16
            )
        )
        scheduler = diffusers.schedulers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        )
        encoder, _ = pipelines.image_encoder()
        return parts(
            getattr(diffusers, name),
            prior=model,
            scheduler=scheduler,
            text_encoder=pipelines.text_encoder(projection=True),
            tokenizer=pipelines.tokenizer(),
            image_encoder=encoder,
        )

    return make


def kandinsky3(name: str) -> Callable[[], Any]:
    def make() -> Any:
        unet = seeded(
            lambda: diffusers.Kandinsky3UNet(
                time_embedding_dim=4,
                groups=2,
                attention_head_dim=4,
                layers_per_block=3,
                block_out_channels=(8, 16),
                cross_attention_dim=4,
                encoder_hid_dim=16,
            )
        )
        return parts(getattr(diffusers, name), unet=unet, movq=movq(), scheduler=pipelines.ddim())

    return make


def _image_embeds(seed: int) -> dict[str, torch.Tensor]:
    return embeds(seed, image_embeds=(2, 32))


def _prompts(seed: int) -> dict[str, Any]:
    return {"prompt": ["a cat", "a red dog"] if seed == 1 else ["", "a blue sea"], **_image_embeds(seed)}


_TWO = [picture(0, 16), picture(1, 16)]
_MASKED: dict[str, Any] = {"image": _TWO, "mask_image": [picture(5, 16)] * 2}
_HINT = {"hint": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))}
_SIZE: dict[str, Any] = {"height": 16, "width": 16}
_FROM: dict[str, Any] = {"image": _TWO, "strength": 1.0}

_GIVEN: dict[str, dict[str, Any]] = {
    "KandinskyPipeline": {"output_type": "pt"},
    "KandinskyImg2ImgPipeline": {**_FROM, "output_type": "pt"},
    "KandinskyInpaintPipeline": {**_MASKED, "output_type": "pt"},
    "KandinskyV22Pipeline": {},
    "KandinskyV22Img2ImgPipeline": _FROM,
    "KandinskyV22InpaintPipeline": _MASKED,
    "KandinskyV22ControlnetPipeline": {**_HINT, "output_type": "pt"},
    "KandinskyV22ControlnetImg2ImgPipeline": {**_HINT, **_FROM, "output_type": "pt"},
}

KANDINSKY = {
    name.removesuffix("Pipeline").lower(): Tiny(
        decoder(name),
        _image_embeds if "V22" in name else _prompts,
        # without guidance they ask for the negative embeddings all the same
        fixed={**_SIZE, **given, "negative_image_embeds": torch.zeros(2, 32)},
        elements=4 * 8 * 8,
        kept=(0, 4),
        exact=False,
        **GUIDED,
    )
    for name, given in _GIVEN.items()
}

KANDINSKY |= {
    name.removesuffix("Pipeline").lower(): Tiny(
        prior(name),
        # a negative prompt would make two images more, of itself: without one, the negative prompt is empty
        lambda seed: {"prompt": ["a cat", "a red dog"] if seed == 1 else ["", ""]},
        shared=("prompt",),
        fixed={"output_type": "pt", **({"strength": 1.0, **embeds(3, image=(2, 32))} if "Emb2Emb" in name else {})},
        elements=32,
        counts_steps=False,  # its last row is at timestep 0
        exact=False,
        **GUIDED,
    )
    for name in ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
}

KANDINSKY |= {
    name.removesuffix("Pipeline").lower(): Tiny(
        kandinsky3(name),
        lambda seed: {
            **embeds(seed, prompt_embeds=(2, 6, 16)),
            "attention_mask": torch.arange(6).expand(2, 6) < 4 + seed,
        },
        fixed=given,
        elements=4 * 8 * 8,
        exact=False,
        **GUIDED,
    )
    for name, given in {
        "Kandinsky3Pipeline": {"height": 64, "width": 64},
        "Kandinsky3Img2ImgPipeline": _FROM,
    }.items()
}
