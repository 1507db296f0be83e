"""The noise of one generation: the same draws from the same generators as the stock scheduler makes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from fastguard.schedules.schedule import Schedule

AHEAD = 2**28  # bytes: noise up to this size may be drawn before the loop


class Noise:
    def __init__(self) -> None:
        self._ahead: list[torch.Tensor | None] | None = None  # one per row
        self._generator: Any = None
        self._states: list[torch.Tensor] = []  # of the generators, before anything was drawn ahead

    def draw_ahead(self, schedule: Schedule, latents: torch.Tensor, generator: Any) -> None:
        """Draw that of all rows now, in stock's order, unless it is too large or autocast would have a say in it.

        A generator in host memory would otherwise stop every step for a copy.
        """
        size = sum(schedule.draws) * latents.numel() * latents.element_size()
        if not 0 < size <= AHEAD or torch.is_autocast_enabled(latents.device.type):
            return
        self._generator, self._states = generator, [g.get_state() for g in _each(generator)]
        self._ahead = [_draw(schedule, latents, latents.dtype, generator) if n else None for n in schedule.draws]

    def rewind(self, rows: int) -> None:
        """Only so many rows ran (an interrupt, an error): leave the generators where stock's would be, the later draws not made."""
        if self._ahead is None or rows >= len(self._ahead):
            return
        for one, state in zip(_each(self._generator), self._states, strict=True):
            one.set_state(state)
        for noise in self._ahead[:rows]:
            if noise is not None:
                randn_tensor(noise.shape, generator=self._generator, device=noise.device, dtype=noise.dtype)

    def of_row(
        self, schedule: Schedule, row: int, latents: torch.Tensor, dtype: torch.dtype, generator: Any
    ) -> torch.Tensor | None:
        """Noise of the latents' shape for a row of the table; None where it has none. `dtype` counts if the scheduler names none."""
        if not schedule.linear or not schedule.draws[row]:
            return None
        if self._ahead is not None:
            return self._ahead[row]
        return _draw(schedule, latents, dtype, generator)


def _each(generator: Any) -> list[torch.Generator]:
    """The generators that the caller holds; without one, torch's global one is drawn from and not rewound."""
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


def _draw(schedule: Schedule, latents: torch.Tensor, dtype: torch.dtype, generator: Any) -> torch.Tensor:
    dtype = schedule.noise_dtype or dtype
    return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=dtype)
