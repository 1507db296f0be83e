"""The denoiser as a pipeline is about to call it: what it is conditioned on, without knowing the pipeline's arguments.

look = first_call(pipe, arguments, noise)
u, c = look(noise)                 # at the first timestep
u, c = look(noise, t=41)           # at another one, on the same input
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class _Stop(Exception):
    """Leaves the pipeline before its denoiser runs."""


@dataclass(frozen=True)
class FirstCall:
    """u and c of noise [B, C, *S] of unit variance, for a denoiser that is called with both branches in one batch, u first.

    t      first timestep
    extra  keyword arguments of the denoiser, tensors of 2B rows among them
    """

    pipe: Any
    denoiser: torch.nn.Module
    t: Any
    extra: Mapping[str, Any]
    images: int

    def __call__(
        self, noise: torch.Tensor, *, t: Any = None, of: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """u and c [b, C, *S], with gradients if they are on. `of`: which images the b rows of `noise` belong to; all unless given."""
        extra = (
            self.extra if of is None else rows_of(self.extra, [*of, *(self.images + b for b in of)], 2 * self.images)
        )
        x = self.scaled(noise)
        out = self.denoiser(torch.cat([x, x]), self.t if t is None else t, **extra)
        without, with_prompt = (out[0] if isinstance(out, tuple) else out.sample).chunk(2)
        return without, with_prompt

    def scaled(self, noise: torch.Tensor) -> torch.Tensor:
        """The first row's input of the denoiser: scale_model_input(init_noise_sigma * noise)."""
        scheduler = self.pipe.scheduler
        return scheduler.scale_model_input(noise * scheduler.init_noise_sigma, self.t)


def first_call(pipe: Any, denoiser: torch.nn.Module, arguments: Mapping[str, Any], noise: torch.Tensor) -> FirstCall:
    """Run the pipeline until its denoiser is called and keep what it is called with. `arguments`: of the pipeline, without latents."""
    kept: dict[str, Any] = {}

    def stop(_: torch.nn.Module, args: tuple[Any, ...], extra: dict[str, Any]) -> None:
        names = [name for name, value in zip(("sample", "timestep"), args, strict=False)]
        kept.update({**dict(zip(names, args, strict=False)), **extra})
        raise _Stop

    hook = denoiser.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        pipe(**arguments, latents=noise)
    except _Stop:
        pass
    finally:
        hook.remove()
    extra = {name: value for name, value in kept.items() if name not in ("sample", "timestep")}
    return FirstCall(pipe, denoiser, kept["timestep"], extra, len(noise))


def rows_of(tree: Any, rows: Sequence[int], of: int) -> Any:
    """`tree` with every tensor of `of` rows cut down to `rows`."""
    if isinstance(tree, torch.Tensor):
        return tree[list(rows)] if tree.ndim and len(tree) == of else tree
    if isinstance(tree, dict):
        return {key: rows_of(value, rows, of) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(rows_of(value, rows, of) for value in tree)
    return tree
