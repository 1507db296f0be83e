"""The fused kind: Stable Diffusion 1.x, 2.x (epsilon and v), SDXL and 3, with image-to-image, inpaint and ControlNet; PixArt."""

from __future__ import annotations

from typing import Any

from fastguard.pipelines.families.base import Arguments, Family, Said


class FixedScale(Family):
    """Pipelines that combine with their argument and never look at themselves again: a callback cannot change the scale."""

    def guidance(self, pipe: Any, arguments: Arguments) -> Said:
        rescale = arguments.get("guidance_rescale") or 0.0
        return Said(bool(pipe.do_classifier_free_guidance), float(arguments["guidance_scale"]), float(rescale))


class _StableDiffusion3(Family):
    """Rectified flow, no `scale_model_input`."""

    def refusal(self, pipe: Any, arguments: Arguments) -> str | None:
        layers = arguments.get("skip_guidance_layers")
        if layers is not None:  # stock asks the same: an empty list runs the third branch, too
            return (
                f"skip_guidance_layers={layers!r}: skip-layer guidance runs a third branch and changes the combination; "
                "pass None, or call the pipeline without the guard"
            )
        return super().refusal(pipe, arguments)


class _PixArt(Family):
    """The transformer also predicts a variance (channels beyond the latents'), which is not guided."""

    def guidance(self, pipe: Any, arguments: Arguments) -> Said:
        """Nothing of it is kept on these pipelines."""
        scale = float(arguments["guidance_scale"])
        return Said(scale > 1.0, scale, 0.0)

    def own_step(self, arguments: Arguments, rows: int) -> str | None:
        if rows == 1 or arguments.get("num_inference_steps") == 1:
            return "a single step: the pipeline reads pred_original_sample from the scheduler"
        return None


_TRANSFORMER: dict[str, Any] = {"denoiser": "transformer", "sample_argument": "hidden_states"}

# With a 4-channel UNet inpainting blends the known region into the latents after every step.
FUSED: tuple[Family, ...] = (
    Family(name="text-to-image", pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline")),
    Family(name="image-to-image", pipelines=("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline")),
    Family(
        name="inpaint",
        pipelines=("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"),
        rewrites_latents=True,
    ),
    Family(name="controlnet", pipelines=("StableDiffusionControlNetPipeline",)),
    FixedScale(
        name="controlnet, fixed scale",
        pipelines=(
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        ),
    ),
    FixedScale(
        name="controlnet inpaint",
        pipelines=(
            "StableDiffusionControlNetInpaintPipeline",
            "StableDiffusionXLControlNetInpaintPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
        ),
        rewrites_latents=True,
    ),
    _StableDiffusion3(
        name="stable-diffusion-3",
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        scales_input=False,
        **_TRANSFORMER,
    ),
    _StableDiffusion3(
        name="stable-diffusion-3-inpaint",
        pipelines=("StableDiffusion3InpaintPipeline",),
        scales_input=False,
        rewrites_latents=True,
        **_TRANSFORMER,
    ),
    _PixArt(name="pixart", pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"), **_TRANSFORMER),
)
