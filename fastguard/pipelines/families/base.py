"""What the guard has to know about a pipeline class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Arguments = Mapping[str, Any]
# What a callback may ask for and no fused call has: the pipeline's own guidance arithmetic runs on placeholders.
_UNSEEN = {"noise_pred", "noise_pred_text", "noise_pred_uncond"}


class Said(NamedTuple):
    """What a pipeline says of guidance right now; a callback may change it. on: whether it runs both branches."""

    on: bool
    scale: float
    rescale: float


@dataclass(frozen=True, kw_only=True)
class Family:
    """A group of pipeline classes whose denoising loops look alike.

    pipelines: class names in diffusers.
    denoiser: name of the component called once a step with [2B, C, ...] rows, as `denoiser(sample, timestep, ...)`.
    sample_argument: the keyword under which some pipelines pass the sample.
    rewrites_latents: the loop itself changes the latents between two steps (inpaint blending), so each step starts from what the
        pipeline hands over and not from what the last step left in the buffers.
    scales_input: the loop calls `scheduler.scale_model_input` before every call of the denoiser.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str = "unet"
    sample_argument: str = "sample"
    rewrites_latents: bool = False
    scales_input: bool = True

    @property
    def denoisers(self) -> tuple[str, ...]:
        return (self.denoiser,)

    def guidance(self, pipe: Any, arguments: Arguments) -> Said:
        """Right now."""
        rescale = getattr(pipe, "guidance_rescale", 0.0) or 0.0
        return Said(bool(pipe.do_classifier_free_guidance), float(pipe.guidance_scale), float(rescale))

    def refusal(self, pipe: Any, arguments: Arguments) -> str | None:
        """Why this call cannot be guarded although the class can; names the argument."""
        wanted = _UNSEEN.intersection(arguments.get("callback_on_step_end_tensor_inputs") or ())
        if not wanted:
            return None
        return (
            f"callback_on_step_end_tensor_inputs holds {min(wanted)!r}, which is formed inside the fused step and not seen outside; leave it "
            f"out, or call the pipeline without the guard"
        )

    def own_step(self, arguments: Arguments, rows: int) -> str | None:
        """Why the scheduler's own step() must run in a call of so many rows (it returns something that the table does not hold)."""
        return None
