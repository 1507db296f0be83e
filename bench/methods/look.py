"""The first rows under plain guidance: what a detector may know before an image is made. Six pairs of rows instead of 50.

With x_k the latents before row k, u_k, c_k the denoiser's outputs there in epsilon space, n the elements of a latent and t the timesteps:

d_curve        ||c_k - u_k||^2 of the model's own output, k = 0 .. 4 (Wen et al., ICLR 2024: its mean over rows and noises)
change         RMS(c_{k+1} - c_k), k = 0 .. 3: "first-step change", github.com/randomnameforicml/icml-2026. Free
update         RMS(x_{k+1} - x_k), k = 0 .. 4: norm of the latent update (Broken Memories, KDD 2026, has bands of it; no public code). Free
norm, cosine   ||c_0 - u_0|| sqrt(16384 / n), and the mean over places of the cosine over channels of u and c - u on the SAME noise at
               the timestep of the last row but two (Asthana and Belagiannis, ICLR 2026, arXiv 2601.20642, as released). One pair more

The latents it returns are x0(c) at the first row, the first conditional prediction: the picture that a memorized prompt shows at once.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from bench.methods import loop
from bench.methods.base import Method, Request, denoiser
from bench.methods.first_call import first_call
from bench.methods.han import PUBLISHED, norm

ROWS = 5
LOW_NOISE = -3  # place of the anisotropy's timestep among the rows


class FirstLook(Method):
    """Five rows of plain guidance and one pair on the first noise at a low-noise timestep; `generate` gives x0(c) of the first row."""

    name = "first-look"

    def check(self, pipe: Any) -> None:
        if not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
            raise TypeError(
                f"method {self.name!r} does not support {type(pipe).__name__}: Stable Diffusion 1.x, 2.x and XL only"
            )
        if getattr(pipe.scheduler, "alphas_cumprod", None) is None or pipe.scheduler.order > 1:
            raise TypeError(
                f"method {self.name!r} does not support {type(pipe.scheduler).__name__}: one row a step, alphas_cumprod"
            )

    @torch.no_grad()
    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        noise = loop.draw(pipe, request.generators)
        look = first_call(pipe, denoiser(pipe), request.arguments, noise)
        inputs: list[torch.Tensor] = []
        outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        latents, times = [noise * pipe.scheduler.init_noise_sigma], [look.t]

        def note(_: torch.nn.Module, args: tuple[Any, ...], extra: dict[str, Any], output: Any) -> None:
            inputs.append((args[0] if args else extra["sample"]).chunk(2)[0].float())
            without, with_prompt = (output[0] if isinstance(output, tuple) else output.sample).float().chunk(2)
            outputs.append((without, with_prompt))

        def after(pipe: Any, k: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents.append(tensors["latents"].clone())
            times.append(t)
            pipe._interrupt = k + 1 >= ROWS
            return tensors

        hook = denoiser(pipe).register_forward_hook(note, with_kwargs=True)
        try:
            pipe(**request.arguments, latents=noise, callback_on_step_end=after)
        finally:
            hook.remove()
        times = times[1:]
        eps = [
            tuple(epsilon(pipe.scheduler, o, y, t) for o in pair)
            for pair, y, t in zip(outputs, inputs, times, strict=True)
        ]
        elements = noise[0].numel()
        low = pipe.scheduler.timesteps[LOW_NOISE if len(pipe.scheduler.timesteps) >= -LOW_NOISE else -1]
        u, c = (epsilon(pipe.scheduler, o.float(), look.scaled(noise).float(), low) for o in look(noise, t=low))
        cosine = torch.cosine_similarity(u, c - u, dim=1).flatten(1).mean(1)
        columns = {
            "d_curve": torch.stack([(c - u).flatten(1).square().sum(1) for u, c in outputs], 1),
            "change": torch.stack([rms(b[1] - a[1]) for a, b in pairwise(eps)], 1),
            "update": torch.stack([rms(b - a) for a, b in pairwise(latents)], 1),
            "norm": norm(eps[0][1] - eps[0][0]) * math.sqrt(PUBLISHED / elements),
            "cosine": cosine,
        }
        shown = {name: value.tolist() for name, value in columns.items()}
        details = [
            {"elements": elements, "timesteps": [float(t) for t in times], **{k: v[b] for k, v in shown.items()}}
            for b in range(len(noise))
        ]
        return clean(pipe.scheduler, eps[0][1], inputs[0], times[0]), details


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root of the mean of squares per image, float32 [B]."""
    return x.float().flatten(1).square().mean(1).sqrt()


def level(scheduler: Any, t: Any) -> float:
    """alpha_bar at a training timestep."""
    return float(scheduler.alphas_cumprod[round(float(t))])


def epsilon(scheduler: Any, output: torch.Tensor, y: torch.Tensor, t: Any) -> torch.Tensor:
    """The denoiser's output as a prediction of the noise, y its input: eps; sqrt(a) v + sqrt(1 - a) y; (y - sqrt(a) x0) / sqrt(1 - a)."""
    a, kind = level(scheduler, t), scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        return math.sqrt(a) * output + math.sqrt(1 - a) * y
    if kind == "sample":
        return (y - math.sqrt(a) * output) / math.sqrt(1 - a)
    raise ValueError(f"prediction_type={kind!r}: must be 'epsilon', 'v_prediction' or 'sample'")


def clean(scheduler: Any, eps: torch.Tensor, y: torch.Tensor, t: Any) -> torch.Tensor:
    """x0 = (y - sqrt(1 - a) eps) / sqrt(a)."""
    a = level(scheduler, t)
    return (y - math.sqrt(1 - a) * eps) / math.sqrt(a)
