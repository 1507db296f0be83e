"""Stable Diffusion 3 and 3.5: rectified flow, no `scale_model_input`."""

from __future__ import annotations

from typing import Any

from fastguard.pipelines.families.base import Arguments, Family


class _StableDiffusion3(Family):
    def refusal(self, pipe: Any, arguments: Arguments) -> str | None:
        layers = arguments.get("skip_guidance_layers")
        if layers is not None:  # stock asks the same: an empty list runs the third branch, too
            return (
                f"skip_guidance_layers={layers!r}: skip-layer guidance runs a third branch and changes the combination; "
                "pass None, or call the pipeline without the guard"
            )
        return super().refusal(pipe, arguments)


SD3 = _StableDiffusion3(
    name="stable-diffusion-3",
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    denoiser="transformer",
    sample_argument="hidden_states",
    scales_input=False,
)
SD3_INPAINT = _StableDiffusion3(
    name="stable-diffusion-3-inpaint",
    pipelines=("StableDiffusion3InpaintPipeline",),
    denoiser="transformer",
    sample_argument="hidden_states",
    scales_input=False,
    rewrites_latents=True,
)
