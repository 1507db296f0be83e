"""Guidance in a limited interval of noise levels: Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bench.methods import loop
from bench.methods.base import Method, Request


class Interval(Method):
    """g = guidance scale where low < sigma <= high, else g = 1, which is the conditional branch alone: one row instead of two.

    e = u + g (c - u),  sigma(t) = sqrt((1 - alpha_bar(t)) / alpha_bar(t))

    low, high  sigma; the paper's for Stable Diffusion XL are 0.28 and 5.42

    details: `timesteps`, `sigmas` and `guided` (bool), per row.
    """

    def __init__(self, low: float = 0.28, high: float = 5.42, *, name: str = "interval") -> None:
        if not 0 <= low < high:
            raise ValueError(f"low={low!r}, high={high!r}: must be 0 <= low < high")
        self.low, self.high, self.name = low, high, name

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        if not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise TypeError(
                f"method {self.name!r} does not support {type(pipe.scheduler).__name__}: it has no alphas_cumprod"
            )

    @torch.no_grad()
    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        u, c = loop.encode(pipe, request.prompts)
        x = loop.begin(pipe, loop.draw(pipe, request.generators), request.steps)
        times = pipe.scheduler.timesteps
        sigmas = [sigma(pipe.scheduler, float(t)) for t in times]
        guided = [self.low < s <= self.high for s in sigmas]
        for t, two in zip(times, guided, strict=True):
            if two:
                without, with_prompt = loop.both(pipe, x, t, u, c)
                e = without + request.guidance_scale * (with_prompt - without)
            else:
                e = loop.predict(pipe, x, t, c)
            x = loop.step(pipe, e, t, x, request.generators)
        details = {"timesteps": [float(t) for t in times], "sigmas": sigmas, "guided": guided}
        return x, [dict(details) for _ in request.prompts]


def sigma(scheduler: Any, t: float) -> float:
    """sigma at a training timestep; between two of them log sigma is linear in t."""
    kept = scheduler.alphas_cumprod.double().cpu().numpy()
    logs = 0.5 * (np.log1p(-kept) - np.log(kept))
    return math.exp(float(np.interp(t, np.arange(len(kept)), logs)))
