"""Tiny random instances of the pipeline classes that people run most, with what a call of them needs."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.instance import Tiny, embeds, euler, negative_alone, parts, run, seeded
from tests.families.makers import (
    auraflow,
    chroma,
    cogvideox,
    flux,
    flux_transformer,
    klein,
    ltx,
    qwen,
    sana,
    unipc,
    wan,
    wan_transformer,
    z_image,
    z_image_transformer,
)

__all__ = [
    "CASES",
    "SQUARE",
    "VIDEO",
    "Tiny",
    "chroma",
    "cogvideox",
    "embeds",
    "euler",
    "flux",
    "flux_transformer",
    "ltx",
    "negative_alone",
    "parts",
    "qwen",
    "run",
    "seeded",
    "unipc",
    "wan",
    "wan_transformer",
    "z_image_transformer",
]


SQUARE = {"height": 32, "width": 32}
VIDEO = {"height": 32, "width": 32, "num_frames": 5}


def _masked(seed: int, width: int, length: int = 7, mask: str = "prompt_attention_mask", dtype: Any = None) -> dict:
    ones = torch.ones(2, length, dtype=dtype or torch.float32)
    return {**embeds(seed, prompt_embeds=(2, length, width)), mask: ones}


CASES: dict[str, Tiny] = {
    "flux": Tiny(
        flux(),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32), pooled_prompt_embeds=(2, 32)),
        on={"true_cfg_scale": 4.0},
        off={"true_cfg_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "qwen": Tiny(
        qwen(),
        lambda seed: _masked(seed, 16, length=5 + seed, mask="prompt_embeds_mask", dtype=torch.int64),
        on={"true_cfg_scale": 4.0},
        off={"true_cfg_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
        bends=True,
    ),
    "wan": Tiny(
        wan(),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=VIDEO,
        elements=16 * 2 * 4 * 4,
    ),
    "wan 2.2": Tiny(
        wan(boundary=0.875, scheduler=unipc),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        on={"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        off={"guidance_scale": 1.0},
        fixed=VIDEO,
        elements=16 * 2 * 4 * 4,
        full_rows=2,
    ),
    "z-image": Tiny(
        z_image,
        lambda seed: {"prompt_embeds": list(embeds(seed, prompt_embeds=(2, 5 + seed, 16))["prompt_embeds"])},
        on={"guidance_scale": 3.0},
        off={"guidance_scale": 0.0},
        fixed=SQUARE,
        elements=16 * 4 * 4,
        exact=False,
    ),
    "klein": Tiny(
        klein,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "chroma": Tiny(
        chroma,
        lambda seed: _masked(seed, 32),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "sana": Tiny(
        sana,
        lambda seed: _masked(seed, 8),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None},
        elements=4 * 2 * 2,
        exact=False,
    ),
    "ltx": Tiny(
        ltx(),
        lambda seed: _masked(seed, 16, dtype=torch.int64),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 64, "width": 64, "num_frames": 9},
        elements=8 * 2 * 2 * 2,
        exact=False,
    ),
    "cogvideox, ddim": Tiny(
        cogvideox("CogVideoXDDIMScheduler"),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 16)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 32, "width": 32, "num_frames": 5},
        elements=4 * 2 * 4 * 4,
        exact=False,
    ),
    "cogvideox, dpm": Tiny(
        cogvideox("CogVideoXDPMScheduler"),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 16)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 32, "width": 32, "num_frames": 5},
        elements=4 * 2 * 4 * 4,
        exact=False,
    ),
    "auraflow": Tiny(
        auraflow,
        lambda seed: _masked(seed, 16),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 4 * 4,
        exact=False,
    ),
}
