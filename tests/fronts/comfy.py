"""As much of ComfyUI's calling contract as a model patch meets: patcher, sampling function, noise schedules and samplers.

Written for the tests from the behaviour of ComfyUI's comfy/model_patcher.py, comfy/samplers.py, comfy/model_sampling.py and its
k-diffusion samplers; a name of theirs means the same here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from fastguard.fronts.comfyui.patch import Guarded

SHAPE = (4, 6, 6)


class EPS:
    """Variance exploding: x = x0 + sigma n."""


class CONST:
    """Rectified flow: x = (1 - sigma) x0 + sigma n."""


class Discrete(EPS):
    """Stable Diffusion's 1000 noise levels."""

    def __init__(self) -> None:
        kept = (1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
        self.sigmas = ((1.0 - kept) / kept).sqrt()
        self.sigma_min, self.sigma_max = self.sigmas[0], self.sigmas[-1]

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)


class Flow(CONST):
    def __init__(self, multiplier: float = 1000.0) -> None:
        self.multiplier, self.sigma_min, self.sigma_max = multiplier, torch.tensor(0.001), torch.tensor(1.0)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.multiplier


class Continuous(EPS):
    """EDM: timesteps are logarithms."""

    sigma_min, sigma_max = torch.tensor(0.002), torch.tensor(40.0)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return 0.25 * sigma.log()


class Model:
    """x0-predictions of B images whose distance, in epsilon, is size(b, sigma)."""

    def __init__(self, sampling: Any, size: Callable[[int, float], float]) -> None:
        self.model_sampling, self.size = sampling, size
        generator = torch.Generator().manual_seed(3)
        self.pictures, self.directions = torch.randn(2, 16, *SHAPE, generator=generator)

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, conds: list[Any]) -> list[torch.Tensor]:
        level, batch = float(sigma[0]), len(x)
        u = 0.5 * self.pictures[:batch] + 0.01 * x
        size = torch.tensor([self.size(b, level) for b in range(batch)]).view(-1, *[1] * len(SHAPE))
        c = u - level * size * self.directions[:batch]
        return [torch.zeros_like(x) if not cond else {"positive": c, "negative": u}[cond[0]] for cond in conds]


class Patcher:
    """ModelPatcher's part in guidance."""

    def __init__(self, model: Any, options: dict[str, Any] | None = None) -> None:
        self.model, self.model_options = model, options or {"transformer_options": {}}

    def clone(self) -> Patcher:
        return Patcher(self.model, _copied(self.model_options))

    def set_model_sampler_cfg_function(self, function: Any, disable_cfg1_optimization: bool = False) -> None:
        self.model_options["sampler_cfg_function"] = function
        self.model_options["disable_cfg1_optimization"] = disable_cfg1_optimization

    def set_model_sampler_post_cfg_function(self, function: Any, disable_cfg1_optimization: bool = False) -> None:
        self.model_options["sampler_post_cfg_function"] = [
            *self.model_options.get("sampler_post_cfg_function", []),
            function,
        ]
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True


def _copied(options: Any) -> Any:
    """Dictionaries and lists are copied, whatever they hold is shared."""
    if isinstance(options, dict):
        return {key: _copied(value) for key, value in options.items()}
    return [_copied(value) for value in options] if isinstance(options, list) else options


def sampling_function(
    model: Model,
    x: torch.Tensor,
    timestep: torch.Tensor,
    uncond: Any,
    cond: Any,
    cond_scale: float,
    model_options: dict,
) -> torch.Tensor:
    if math.isclose(cond_scale, 1.0) and not model_options.get("disable_cfg1_optimization", False):
        uncond = None
    c, u = model.predict(x, timestep, [cond, uncond])
    shared = {"cond_scale": cond_scale, "model": model, "model_options": model_options, "input": x, "sigma": timestep}
    shared |= {"cond_denoised": c, "uncond_denoised": u}
    if (function := model_options.get("sampler_cfg_function")) is not None:
        denoised = x - function({**shared, "cond": x - c, "uncond": x - u, "timestep": timestep})
    else:
        denoised = u + (c - u) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        denoised = function({**shared, "denoised": denoised, "cond": cond, "uncond": uncond})
    return denoised


def sample(
    patcher: Patcher,
    sampler: Any,
    sigmas: torch.Tensor,
    batch: int = 1,
    cfg: float = 7.5,
    negative: Any = ("negative",),
    share_options: bool = False,
) -> torch.Tensor:
    """One run, as of a KSampler node. share_options: without the copy of the options that each run of ComfyUI has."""
    options = patcher.model_options if share_options else _copied(patcher.model_options)
    options["transformer_options"]["sample_sigmas"] = sigmas
    negative = None if negative is None else list(negative)

    def denoise(x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        levels = torch.as_tensor(sigma) * x.new_ones(len(x))
        return sampling_function(patcher.model, x, levels, negative, ["positive"], cfg, options)

    noise = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(11))
    return sampler(denoise, noise * sigmas[0], sigmas)


# What the tests patch with it ----------------------------------------------------------------------------------------------


SIGMAS = torch.cat([Discrete().sigmas[list(range(999, 0, -111))], torch.zeros(1)])  # t = 999, 888, ... 111


def dip(b: int, sigma: float) -> float:
    """RMS-like size of (c - u) in epsilon: falls to a minimum at another sigma for every image, then rises."""
    return 1.0 + abs(math.log(sigma) - 0.8 + 0.7 * (b % 3)) + 0.1 * b


def guarded(chosen: Any, model: Any = None) -> Patcher:
    """The patched model as the node makes it, with a policy that no widget can hold."""
    patcher = Patcher(model or Model(Discrete(), dip)).clone()
    patcher.set_model_sampler_post_cfg_function(Guarded(chosen), disable_cfg1_optimization=True)
    return patcher


# Samplers: (denoise, x, sigmas) -> x. -------------------------------------------------------------------------------------


def euler(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor, churn: float = 0.0) -> torch.Tensor:
    for sigma, after in pairwise(sigmas):
        sigma = sigma * (1.0 + churn)
        x = x + (x - denoise(x, sigma)) / sigma * (after - sigma)
    return x


def churned(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    return euler(denoise, x, sigmas, churn=0.02)


def heun(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor, rounding: float = 1.0) -> torch.Tensor:
    """The corrector of a step is evaluated at the sigma at which the next step begins."""
    for sigma, after in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + slope * (after - sigma)
        if after > 0:
            slope = (slope + (ahead - denoise(ahead, after * rounding)) / after) / 2
        x = x + slope * (after - sigma)
    return x


def rounded(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Heun, whose corrector's sigma went through a logarithm and came back a little higher."""
    return heun(denoise, x, sigmas, rounding=1.0 + 2e-7)


def dpm_2(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """The second evaluation of a step lies between two sigmas of the schedule."""
    for sigma, after in pairwise(sigmas):
        slope, between = (x - denoise(x, sigma)) / sigma, sigma
        if after > 0:
            between = (sigma.log() + after.log()).mul(0.5).exp()
            middle = x + slope * (between - sigma)
            slope = (middle - denoise(middle, between)) / between
        x = x + slope * (after - sigma)
    return x


def ancestral(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """dpm_2_ancestral's order of evaluations: the one in between may lie below the next sigma, which then goes up again."""
    generator = torch.Generator().manual_seed(5)
    for sigma, after in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        if after > 0:
            below = after * 0.9
            denoise(x + slope * (below - sigma), below)
            x = x + slope * (below - sigma) + (after**2 - below**2).sqrt() * torch.randn(x.shape, generator=generator)
        else:
            x = x + slope * (after - sigma)
    return x
