"""The initial noise moved to where guidance is small: Han et al., NeurIPS 2025, arXiv 2510.08625 (released: hygnhan/init_noise_diffusion_memorization).

Lengths are published for latents of 4 x 64 x 64; a norm grows as the square root of the number of elements n, so here they are
multiplied by sqrt(n / 16384), which changes nothing at that size. delta(x) = c - u at the first timestep for the noise x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from bench.methods import loop
from bench.methods.base import Method, Request, denoiser
from bench.methods.first_call import FirstCall, first_call, rows_of

PUBLISHED = 16384  # elements of the latents that the published lengths are for


def length(published: float, like: torch.Tensor) -> float:
    """A published length for latents [B, C, *S] of another size."""
    return published * math.sqrt(like[0].numel() / PUBLISHED)


class _Han(Method):
    def check(self, pipe: Any) -> None:
        if not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)) or (
            pipe.unet.config.time_cond_proj_dim is not None
        ):
            raise TypeError(
                f"method {self.name!r} does not support {type(pipe).__name__}: it is written for StableDiffusionPipeline and "
                "StableDiffusionXLPipeline (no guidance-distilled UNet)"
            )

    def start(self, pipe: Any, request: Request) -> tuple[torch.Tensor, FirstCall]:
        """Stock's noise and the denoiser's first call."""
        noise = loop.draw(pipe, request.generators)
        return noise, first_call(pipe, denoiser(pipe), request.arguments, noise)


class HanBatch(_Han):
    """`updates` sharpness-aware updates without gradients, then guidance left out for `without` rows, the unconditional branch alone:

        x <- x - gamma (delta(x + rho delta(x) / |delta(x)|) - delta(x))

    Costs 4 rows an image and update, and saves one an image for each row without guidance (the released code computes both branches
    there and throws one away): 2N + 8 - 5 for N steps, 2N + 8 as released.
    """

    def __init__(
        self, *, updates: int = 2, rho: float = 50.0, gamma: float = 0.7, without: int = 5, name: str = "han-batch"
    ) -> None:
        self.updates, self.rho, self.gamma, self.without, self.name = updates, rho, gamma, without, name

    @torch.no_grad()
    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        x, look = self.start(pipe, request)
        norms = []
        for _ in range(self.updates):
            delta = difference(look, x)
            size = norm(delta)
            norms.append(size)
            ahead = x + length(self.rho, x) * delta / spread(size, x)
            x = x - self.gamma * (difference(look, ahead) - delta)
        with unconditional(denoiser(pipe), self.without):
            latents = pipe(**request.arguments, latents=x.to(look.pipe.unet.dtype)).images
        return latents, [{"norms": one} for one in torch.stack(norms, 1).tolist()]


class HanSample(_Han):
    """Every image by itself: AdamW on the noise until |delta(x)| <= target, checked before an update, or `iterations` updates; then stock.

    Costs two rows an image for each evaluation and a backward pass for each update, which `rows` does not count.
    details: `losses`, the first and the last; `updates`, each with a backward pass.
    """

    def __init__(
        self, *, target: float = 0.9, lr: float = 0.01, iterations: int = 1000, name: str = "han-sample"
    ) -> None:
        self.target, self.lr, self.iterations, self.name = target, lr, iterations, name

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        with torch.no_grad():
            noise, look = self.start(pipe, request)
        x, details = self.optimise(noise, look)
        return pipe(**request.arguments, latents=x.to(pipe.unet.dtype)).images, details

    @torch.enable_grad()
    def optimise(self, noise: torch.Tensor, look: FirstCall) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """The new noise [B, C, *S] and the details. A parameter an image: AdamW leaves alone what has no gradient."""
        xs = [one.detach().float().clone().requires_grad_(True) for one in noise]
        adam = torch.optim.AdamW(xs, lr=self.lr)
        target, active = length(self.target, noise), list(range(len(xs)))
        details: list[dict[str, Any]] = [{"losses": [], "updates": 0} for _ in xs]
        for _ in range(self.iterations):
            stacked = torch.stack([xs[b] for b in active]).to(noise.dtype)
            u, c = look(stacked, of=active)
            losses = norm(c - u)
            adam.zero_grad(set_to_none=True)
            going = [place for place, loss in enumerate(losses.tolist()) if loss > target]
            for b, loss in zip(active, losses.tolist(), strict=True):
                details[b]["losses"] = [*details[b]["losses"][:1], loss]
            active, left = [active[place] for place in going], losses[going]
            if not active:
                break
            for b, gradient in zip(active, torch.autograd.grad(left.sum(), [xs[b] for b in active]), strict=True):
                xs[b].grad = gradient
                details[b]["updates"] += 1
            adam.step()
        return torch.stack(xs).detach(), details


def difference(look: FirstCall, x: torch.Tensor) -> torch.Tensor:
    """delta(x) = c - u [B, C, *S]."""
    u, c = look(x)
    return c - u


def norm(x: torch.Tensor) -> torch.Tensor:
    """Root of the sum of squares per image, float32 [B]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float32)


def spread(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] to [B, 1, 1, ...] in the dtype of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


@contextmanager
def unconditional(module: torch.nn.Module, calls: int) -> Iterator[None]:
    """For the denoiser's first `calls` calls the first half of its batch alone is computed and stands for both: e = u."""
    done = 0

    def cut(_: torch.nn.Module, args: tuple[Any, ...], extra: dict[str, Any]) -> tuple[Any, Any] | None:
        nonlocal done
        done += 1
        if done > calls:
            return None
        whole = len(args[0])
        return rows_of(args, range(whole // 2), whole), rows_of(extra, range(whole // 2), whole)

    def twice(_: torch.nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if done > calls:
            return None
        return (torch.cat([output[0], output[0]]), *output[1:])

    hooks = [
        module.register_forward_pre_hook(cut, with_kwargs=True, prepend=True),
        module.register_forward_hook(twice),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
