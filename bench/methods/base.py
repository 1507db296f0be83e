"""What a method is, and the one place where its denoiser rows and its seconds are counted."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class Generated:
    """What one call of a method gave for B prompts.

    latents  float32 [B, C, H, W], as the pipeline's output_type="latent"
    rows     denoiser rows in all: the sum of the batch sizes of every forward of the UNet, gradient steps and probes included
    seconds  wall clock of the whole call, text encoder included, the device waited for
    details  one dictionary of JSON values per image: curve of d, transition, ...; {} if the method has nothing to say
    """

    latents: torch.Tensor
    rows: int
    seconds: float
    details: list[dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """The arguments of one call, image b from prompts[b] and generators[b]."""

    prompts: list[str]
    generators: list[torch.Generator]
    steps: int
    guidance_scale: float

    @property
    def arguments(self) -> dict[str, Any]:
        """For a stock pipeline."""
        return {
            "prompt": self.prompts,
            "generator": self.generators,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "output_type": "latent",
        }


class Method(ABC):
    """Prompts and generators in, `Generated` out: a method is its `generate`; checking, counting and timing are here.

    Every method starts from the noise that stock draws from these generators.
    """

    name: str

    @abstractmethod
    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Latents [B, C, H, W] and the details of each image."""

    def check(self, pipe: Any) -> None:
        """TypeError where the method cannot run on this pipeline."""
        if not isinstance(pipe, StableDiffusionPipeline) or pipe.unet.config.time_cond_proj_dim is not None:
            raise TypeError(
                f"method {self.name!r} does not support {type(pipe).__name__}: it is written for StableDiffusionPipeline "
                "(Stable Diffusion 1.x and 2.x, no guidance-distilled UNet)"
            )

    def prepare(self, pipe: Any) -> Any:
        """The pipeline to run on: `pipe` or a shallow copy of it with other parts. Not timed."""
        return pipe

    def __call__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Generated:
        """TypeError for a pipeline that the method does not support, ValueError for arguments that do not fit."""
        self.check(pipe)
        if not prompts or len(prompts) != len(generators):
            raise ValueError(
                f"generators: {len(generators)} of them for {len(prompts)} prompts: must be one per prompt, at least one"
            )
        if not guidance_scale > 1:
            raise ValueError(f"guidance_scale={guidance_scale!r}: must be above 1, or stock runs without guidance")
        request = Request(list(prompts), list(generators), num_inference_steps, guidance_scale)
        ready = self.prepare(pipe)
        with count_rows(denoiser(ready)) as rows:
            start = _now(pipe.device)
            latents, details = self.generate(ready, request)
            seconds = _now(pipe.device) - start
        return Generated(latents.detach().float(), sum(rows), seconds, details)


def denoiser(pipe: Any) -> torch.nn.Module:
    """The pipeline's UNet or transformer."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


@contextmanager
def count_rows(module: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every forward of `module`, in order. fastguard sees the hook and makes no CUDA graph, so none is missed."""
    rows: list[int] = []

    def note(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows.append(int(first.shape[0]))

    note.only_looks = True  # type: ignore[attr-defined]  # so fastguard still runs one branch where that is enough
    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
