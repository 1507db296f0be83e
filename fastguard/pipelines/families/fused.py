"""The fused kind: Stable Diffusion 1.x, 2.x (epsilon and v), SDXL and 3, with image-to-image, inpaint and ControlNet; PixArt."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastguard.pipelines.families.family import Arguments, Family

# What a callback may ask for and no fused call has: the pipeline's own guidance arithmetic runs on placeholders.
_UNSEEN = {"noise_pred", "noise_pred_text", "noise_pred_uncond"}


class Said(NamedTuple):
    """What a pipeline says of guidance right now; a callback may change it. on: whether it runs both branches."""

    on: bool
    scale: float
    rescale: float


@dataclass(frozen=True, kw_only=True)
class Fused(Family):
    """Pipeline classes whose combination is u + s (c - u) of one batch [u, c] with one call of one denoiser a row,
    `denoiser(sample, timestep, ...)`; the guard takes it into its own op.

    sample_argument: the keyword under which some pipelines pass the sample.
    rewrites_latents: the loop itself changes the latents between two steps (inpaint with a 4-channel UNet blends the known region
        in), so each step starts from what the pipeline hands over and not from what the last step left in the buffers.
    scales_input: the loop calls `scheduler.scale_model_input` before every call of the denoiser.
    reads_x0: a call of a single step reads pred_original_sample from the scheduler, which a table does not hold.
    """

    denoisers: tuple[str, ...] = ("unet",)
    nonlinear: str | None = "guidance_rescale"
    second_branch: str = "pass a guidance_scale above 1 to a model with classifier-free guidance"
    sample_argument: str = "sample"
    rewrites_latents: bool = False
    scales_input: bool = True
    reads_x0: bool = False

    def guidance(self, pipe: Any, arguments: Arguments) -> Said:
        """Right now."""
        rescale: Any
        if self.live:
            scale, rescale = pipe.guidance_scale, getattr(pipe, "guidance_rescale", None)
        else:
            scale, rescale = arguments["guidance_scale"], arguments.get("guidance_rescale")
        on = getattr(pipe, "do_classifier_free_guidance", scale > 1.0)  # PixArt keeps nothing of it
        return Said(bool(on), float(scale), float(rescale or 0.0))

    def refusal(self, pipe: Any, arguments: Arguments) -> str | None:
        layers = arguments.get("skip_guidance_layers")
        if layers is not None:  # stock asks the same: an empty list runs the third branch, too
            return (
                f"skip_guidance_layers={layers!r}: skip-layer guidance runs a third branch and changes the combination; "
                "pass None, or call the pipeline without the guard"
            )
        if wanted := _UNSEEN.intersection(arguments.get("callback_on_step_end_tensor_inputs") or ()):
            return (
                f"callback_on_step_end_tensor_inputs holds {min(wanted)!r}, which is formed inside the fused step and not seen outside; "
                f"leave it out, or call the pipeline without the guard"
            )
        return None
