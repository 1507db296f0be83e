"""The loops that the authors of the paper released, mended so that they run; their cost is left as it is.

Jain et al., CVPR 2025, arXiv 2411.16738; SonyResearch/mitigating_memorization. Batch 1, both branches in every step, a number read
back from the device (`.item()`) in every step. What was mended: undefined names; the sign of the opposite scale, which flipped on
every step; exit(0) at the transition; the second pass begins from the noise of the first; and the static script's re-spacing, which
happened only if a timestep happened to equal t*, is gone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from diffusers import PNDMScheduler

from bench.methods import loop
from bench.methods.base import Method, Request

FALLBACK = 5  # transition step of the opposite script where the probe shows no minimum
FINER = 4  # its steps after the transition: 200 on the whole range for 50


class Reference(Method):
    """One image after the other."""

    @torch.no_grad()
    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        images, details = [], []
        for prompt, generator in zip(request.prompts, request.generators, strict=True):
            u, c = loop.encode(pipe, [prompt])
            noise = loop.draw(pipe, [generator])
            image, detail = self.single(pipe, noise, (u, c), generator, request)
            images.append(image)
            details.append(detail)
        return torch.cat(images), details

    @abstractmethod
    def single(
        self,
        pipe: Any,
        noise: torch.Tensor,
        embeddings: tuple[torch.Tensor, torch.Tensor],
        generator: torch.Generator,
        request: Request,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The latent [1, C, H, W] and details of one image."""


class Dynamic(Reference):
    """Dynamic transition: g = before until n[k-1] < n[k-2] and n[k-1] < n[k], n = ||c - u||; from step k on g = guidance scale.

    before  a number, or "opposite": minus the guidance scale. The released script has 1, the conditional branch alone
    """

    def __init__(self, before: float | str = 1.0, *, name: str = "reference-dtp") -> None:
        self.before, self.name = before, name

    def single(self, pipe, noise, embeddings, generator, request):
        x = loop.begin(pipe, noise, request.steps)
        norms: list[float] = []
        transition = None
        times = pipe.scheduler.timesteps
        scale = request.guidance_scale
        before = -scale if self.before == "opposite" else float(self.before)
        for k, t in enumerate(times):
            u, c = loop.both(pipe, x, t, *embeddings)
            norms.append(torch.linalg.vector_norm(c - u, dtype=torch.float32).item())
            if transition is None and k >= 2 and norms[k - 1] < norms[k - 2] and norms[k - 1] < norms[k]:
                transition = k
            g = before if transition is None else scale
            x = loop.step(pipe, u + g * (c - u), t, x, [generator])
        return x, _details(norms, times, transition)


class Static(Reference):
    """Static transition: g = before while t > t_star, then the guidance scale."""

    def __init__(self, t_star: float = 500.0, before: float = 0.0, *, name: str = "reference-stp") -> None:
        self.t_star, self.before, self.name = t_star, before, name

    def single(self, pipe, noise, embeddings, generator, request):
        x = loop.begin(pipe, noise, request.steps)
        norms: list[float] = []
        transition = None
        times = pipe.scheduler.timesteps
        for k, t in enumerate(times):
            u, c = loop.both(pipe, x, t, *embeddings)
            norms.append(torch.linalg.vector_norm(c - u, dtype=torch.float32).item())
            if transition is None and t <= self.t_star:
                transition = k
            g = self.before if transition is None else request.guidance_scale
            x = loop.step(pipe, u + g * (c - u), t, x, [generator])
        return x, _details(norms, times, transition)


class Opposite(Reference):
    """Opposite guidance and a transition found by a probe: two passes, the second finer after the transition.

    1. Probe: all N steps under e = u - s (c - u). q[k] = 1 - cos(x[k+1], x[k]); the transition step is the first strict local
       minimum of q, the second one if the first is at 1 and there is a second, 5 if there is none.
    2. Again from the same noise: g = -s before the transition step; there the scheduler is set to 4 N steps, of which those at
       or below the current timestep are run under g = s.
    Rows per image: 2 (N + k + about 4 (N - k)), k the transition step.

    details: also `probe_curve`, the q of the first pass.
    """

    name = "reference-og+dtp"

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        if isinstance(pipe.scheduler, PNDMScheduler) or pipe.scheduler.order > 1:
            raise TypeError(
                f"method {self.name!r} does not support {type(pipe.scheduler).__name__}: its steps cannot be set anew half-way"
            )

    def single(self, pipe, noise, embeddings, generator, request):
        scale, steps = request.guidance_scale, request.steps
        curve = self._probe(pipe, noise, embeddings, loop.one_each([generator]), request)
        transition = min(transition_step(curve), steps - 1)

        x = loop.begin(pipe, noise, steps)
        norms: list[float] = []
        first, at = pipe.scheduler.timesteps[:transition], pipe.scheduler.timesteps[transition]
        x = _guided(pipe, x, first, embeddings, -scale, norms, generator)
        pipe.scheduler.set_timesteps(FINER * steps, device=x.device)
        finer = pipe.scheduler.timesteps
        rest = finer[finer <= at]
        x = _guided(pipe, x, rest, embeddings, scale, norms, generator)
        return x, {**_details(norms, [*first, *rest], transition), "probe_curve": curve}

    def _probe(self, pipe, noise, embeddings, generators, request) -> list[float]:
        x = loop.begin(pipe, noise, request.steps)
        curve = []
        for t in pipe.scheduler.timesteps:
            u, c = loop.both(pipe, x, t, *embeddings)
            last = x
            x = loop.step(pipe, u - request.guidance_scale * (c - u), t, x, generators)
            curve.append(1 - torch.cosine_similarity(x.flatten().float(), last.flatten().float(), dim=0).item())
        return curve


def transition_step(curve: list[float]) -> int:
    """Where the opposite script's second pass begins to guide, from the probe's curve."""
    minima = [k for k in range(1, len(curve) - 1) if curve[k] < curve[k - 1] and curve[k] < curve[k + 1]]
    if not minima:
        return FALLBACK
    return minima[1] if minima[0] == 1 and len(minima) > 1 else minima[0]


def _guided(pipe, x, times, embeddings, g, norms, generator) -> torch.Tensor:
    """x after steps at `times` under e = u + g (c - u); appends ||c - u|| of each to `norms`."""
    for t in times:
        u, c = loop.both(pipe, x, t, *embeddings)
        norms.append(torch.linalg.vector_norm(c - u, dtype=torch.float32).item())
        x = loop.step(pipe, u + g * (c - u), t, x, [generator])
    return x


def _details(norms: list[float], times: Any, transition: int | None) -> dict[str, Any]:
    """As in fastguard's reports: d = ||c - u||^2 per row, and where the guidance scale takes over."""
    timesteps = [float(t) for t in times]
    return {
        "timesteps": timesteps,
        "d_curve": [n * n for n in norms],
        "transition_step": transition,
        "transition_timestep": None if transition is None else timesteps[transition],
    }
