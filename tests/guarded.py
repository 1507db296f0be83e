"""What the tests of a guarded pipeline share: equal calls, stock and guarded, compared; pictures; the kinds of pipeline."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from PIL import Image

import fastguard
from tests import pipelines

STEPS = 5

SD_KINDS = {
    "StableDiffusionImg2ImgPipeline": lambda: {"image": picture(), "strength": 0.7},
    "StableDiffusionInpaintPipeline": lambda: {
        "image": picture(),
        "mask_image": mask(),
        "height": 32,
        "width": 32,
    },
    "StableDiffusionControlNetPipeline": lambda: {"image": [picture(), picture(seed=1)]},
    "StableDiffusionControlNetImg2ImgPipeline": lambda: {
        "image": [picture()] * 2,
        "control_image": [picture(seed=1)] * 2,
        "strength": 0.7,
    },
    "StableDiffusionControlNetInpaintPipeline": lambda: {
        "image": [picture()] * 2,
        "mask_image": [mask()] * 2,
        "control_image": [picture(seed=1)] * 2,
    },
}
SCHEDULERS = {
    "ddim": pipelines.ddim,
    "euler": lambda: diffusers.EulerDiscreteScheduler(**pipelines.BETAS),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**pipelines.BETAS),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**pipelines.BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**pipelines.BETAS),
}


def call(pipe, **kwargs):
    defaults = {
        "prompt": ["a red cat", "two dogs"],
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    if "generator" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(3)
    return pipe(**{**defaults, **kwargs}).images


def same(pipe, **kwargs):
    """Stock and guarded outputs of equal calls; generators are made anew for each."""
    make = kwargs.pop("make", dict)
    stock = call(pipe, **kwargs, **make())
    with fastguard.enable(pipe, "cfg") as guard:
        ours = call(pipe, **kwargs, **make())
        report = guard.report
    assert type(ours) is type(stock)
    if isinstance(stock, list):
        ours, stock = (
            np.stack([np.asarray(i) for i in ours]) / 255,
            np.stack([np.asarray(i) for i in stock]) / 255,
        )
        tolerance = 1.01 / 255  # rounding to a byte
    else:
        tolerance = 1e-4
    ours, stock = (np.asarray(v, dtype=np.float64) for v in (ours, stock))
    assert ours.shape == stock.shape
    np.testing.assert_allclose(ours / np.abs(stock).max(), stock / np.abs(stock).max(), rtol=0, atol=tolerance)
    return report


def picture(size=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(size=32):
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, size // 2 :] = 255
    return Image.fromarray(pixels)
