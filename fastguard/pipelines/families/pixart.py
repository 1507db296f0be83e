"""PixArt-alpha and PixArt-Sigma: the transformer also predicts a variance (channels beyond the latents'), which is not guided."""

from __future__ import annotations

from typing import Any

from fastguard.pipelines.families.base import Arguments, FixedScale


class _PixArt(FixedScale):
    # Whether there are two branches is not kept on these pipelines either.
    def guided(self, pipe: Any, arguments: Arguments) -> bool:
        return self.guidance_scale(pipe, arguments) > 1.0

    def own_step(self, arguments: Arguments, rows: int) -> str | None:
        if rows == 1 or arguments.get("num_inference_steps") == 1:
            return "a single step: the pipeline reads pred_original_sample from the scheduler"
        return None


PIXART = _PixArt(
    name="pixart",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    denoiser="transformer",
    sample_argument="hidden_states",
)
