"""Stable Diffusion 1.x, 2.x (epsilon and v) and SDXL, with image-to-image, inpaint and ControlNet."""

from __future__ import annotations

from fastguard.pipelines.families.base import Family, FixedScale

TEXT_TO_IMAGE = Family(
    name="text-to-image",
    pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
)
IMAGE_TO_IMAGE = Family(
    name="image-to-image",
    pipelines=("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"),
)
CONTROLNET = Family(
    name="controlnet",
    pipelines=("StableDiffusionControlNetPipeline",),
)
CONTROLNET_FIXED = FixedScale(
    name="controlnet, fixed scale",
    pipelines=(
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    ),
)
# With a 4-channel UNet the known region is blended into the latents after every step.
INPAINT = Family(
    name="inpaint",
    pipelines=("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
    rewrites_latents=True,
)
CONTROLNET_INPAINT = FixedScale(
    name="controlnet inpaint",
    pipelines=(
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
    ),
    rewrites_latents=True,
)
