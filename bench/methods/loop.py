"""Stock's denoising loop in its parts, for methods that need another loop around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor


def encode(pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings u of the empty prompt and c of the prompts, each [B, tokens, features]."""
    c, u = pipe.encode_prompt(list(prompts), pipe._execution_device, 1, True)
    return u, c


def draw(pipe: Any, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """The standard normal noise [B, C, H, W] that stock draws, before it is scaled; `latents=` of a stock call takes it."""
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    shape = (len(generators), pipe.unet.config.in_channels, height, width)
    return randn_tensor(shape, list(generators), pipe._execution_device, pipe.text_encoder.dtype)


def begin(pipe: Any, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Set the scheduler's timesteps; the first x = init_noise_sigma * noise."""
    pipe.scheduler.set_timesteps(steps, device=noise.device)
    return noise * pipe.scheduler.init_noise_sigma


def predict(pipe: Any, x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """The UNet's output for x [B, C, H, W] at t under embeddings [B, tokens, features]."""
    y = pipe.scheduler.scale_model_input(x, t)
    return pipe.unet(y, t, encoder_hidden_states=embeddings, return_dict=False)[0]


def both(
    pipe: Any, x: torch.Tensor, t: torch.Tensor, u: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of the unconditional and of the conditional branch, in one forward of 2B rows, as stock."""
    without, with_prompt = predict(pipe, torch.cat([x, x]), t, torch.cat([u, c])).chunk(2)
    return without, with_prompt


def step(
    pipe: Any, e: torch.Tensor, t: torch.Tensor, x: torch.Tensor, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """The scheduler's next x from the guided output e; stochastic schedulers draw from the generators, as in stock."""
    extra = pipe.prepare_extra_step_kwargs(list(generators), 0.0)
    return pipe.scheduler.step(e, t, x, **extra, return_dict=False)[0]


def one_each(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    """Copies that will draw the same numbers and leave the originals where they are."""
    copies = []
    for generator in generators:
        twin = torch.Generator(generator.device)
        twin.set_state(generator.get_state())
        copies.append(twin)
    return copies
