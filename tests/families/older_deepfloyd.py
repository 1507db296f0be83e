"""Tiny instances of DeepFloyd IF: pixels instead of latents, a model that predicts a variance besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tests import pipelines
from tests.families.more import GUIDED, picture
from tests.families.tiny import Tiny, embeds, parts, seeded


def _ddpm(variance_type: str = "fixed_small") -> Any:
    """Its last row is at timestep 1: at 0, a policy that switches there would have switched."""
    return diffusers.DDPMScheduler(
        **pipelines.BETAS, steps_offset=1, variance_type=variance_type, thresholding=True, sample_max_value=100.0
    )


def deepfloyd(name: str, variance_type: str = "fixed_small") -> Callable[[], Any]:
    """The pipeline class `name`; a super-resolving one sees the small picture in three more channels, noised to a level."""

    def make() -> Any:
        sees = {"in_channels": 6, "class_embed_type": "timestep"} if "SuperResolution" in name else {"in_channels": 3}
        unet = seeded(lambda: pipelines.unet(**sees, out_channels=6, sample_size=8))
        given = {"image_noising_scheduler": _ddpm()} if "SuperResolution" in name else {}
        kind = getattr(diffusers, name)
        return parts(kind, unet=unet, scheduler=_ddpm(variance_type), requires_safety_checker=False, **given)

    return make


_TWO = [picture(0, 8), picture(1, 8)]
_SMALL = [picture(2, 4), picture(3, 4)]
_MASK = [picture(5, 8)] * 2
_GIVEN: dict[str, dict[str, Any]] = {
    "IFPipeline": {},
    "IFImg2ImgPipeline": {"image": _TWO, "strength": 1.0},
    "IFInpaintingPipeline": {"image": _TWO, "mask_image": _MASK, "strength": 1.0},
    "IFSuperResolutionPipeline": {"image": _SMALL},
    "IFImg2ImgSuperResolutionPipeline": {"image": _SMALL, "original_image": _TWO, "strength": 1.0},
    "IFInpaintingSuperResolutionPipeline": {
        "image": _SMALL,
        "original_image": _TWO,
        "mask_image": _MASK,
        "strength": 1.0,
    },
}

DEEPFLOYD = {
    f"deepfloyd {name.removeprefix('IF').removesuffix('Pipeline') or 'text'}".lower(): Tiny(
        deepfloyd(name),
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 32)),
        fixed={**given, "output_type": "pt"},
        elements=3 * 8 * 8,
        kept=(0, 3),
        exact=False,
        **GUIDED,
    )
    for name, given in _GIVEN.items()
}
