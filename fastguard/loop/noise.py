"""The noise of one generation: the same draws from the same generators as the stock scheduler makes."""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from fastguard.schedules.schedule import Schedule

AHEAD = 2**28  # bytes: noise up to this size may be drawn before the loop


class Noise:
    def __init__(self) -> None:
        self._ahead: list[torch.Tensor | None] = []  # one per row
        self._generator: Any = None
        self._states: list[torch.Tensor] = []  # of the generators, before anything was drawn ahead

    def draw_ahead(self, schedule: Schedule, latents: torch.Tensor, generator: Any) -> None:
        """Draw that of all rows now, in stock's order, unless it is too large or autocast would have a say in it.

        A generator in host memory would otherwise stop every step for a copy.
        """
        size = sum(schedule.draws) * latents.numel() * latents.element_size()
        if 0 < size <= AHEAD and not torch.is_autocast_enabled(latents.device.type):
            self._generator, self._states = generator, [one.get_state() for one in _each(generator)]
            rows = range(len(schedule.draws))
            self._ahead = [self.of_row(schedule, row, latents, latents.dtype, generator) for row in rows]

    def rewind(self, rows: int) -> None:
        """Only so many rows ran (an interrupt, an error): leave the generators where stock's would be, the later draws not made."""
        if rows < len(self._ahead):
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
        if self._ahead:
            return self._ahead[row]
        kind = schedule.noise_dtype or dtype
        return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=kind)


def _each(generator: Any) -> list[torch.Generator]:
    """The generators that the caller holds; without one, torch's global one is drawn from and not rewound."""
    return generator if isinstance(generator, list) else [] if generator is None else [generator]
