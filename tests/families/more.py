"""Tiny random instances of further pipeline classes, and of relatives that share their parts."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import diffusers
import torch

from tests import pipelines
from tests.families.more_makers import (
    cascade,
    cogview3,
    cogview4,
    hidream,
    hunyuan_video,
    krea2,
    lumina2,
    masked,
    mochi,
    motion_unet,
    ovis,
    small_qwen,
    unet,
    wan_i2v,
)
from tests.families.pictures import image_vae, ltx_vae, picture, qwen_vae, wan_vae
from tests.families.tiny import (
    CASES,
    SQUARE,
    VIDEO,
    Tiny,
    embeds,
    flux,
    ltx,
    parts,
    unipc,
)

__all__ = [
    "GUIDED",
    "MORE",
    "another",
    "cogview4",
    "image_vae",
    "masked",
    "motion_unet",
    "picture",
    "qwen_vae",
    "small_qwen",
    "unet",
    "wan_vae",
]


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
