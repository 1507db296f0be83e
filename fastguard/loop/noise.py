"""The noise of one generation: the same draws from the same generators as the stock scheduler makes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from fastguard.schedules.schedule import Schedule

AHEAD = 2**28  # bytes: noise up to this size may be drawn before the loop


class Noise:
    def __init__(self) -> None:
        self._ahead: list[torch.Tensor | None] = []  # one per row
        self._generators: list[torch.Generator] = []
        self._states: list[list[torch.Tensor]] = []  # of the generators before each row's draw

    def draw_ahead(self, schedule: Schedule, latents: torch.Tensor, generator: Any) -> None:
        """Draw that of all rows now, in stock's order, unless it is too large or autocast would have a say in it.

        A generator in host memory would otherwise stop every step for a copy.
        """
        size = sum(schedule.draws) * latents.numel() * latents.element_size()
        if 0 < size <= AHEAD and not torch.is_autocast_enabled(latents.device.type):
            # Without one of the caller's, torch's global one is drawn from and not rewound.
            self._generators = [one for one in (generator if isinstance(generator, list) else [generator]) if one]
            ahead = []
            for row in range(len(schedule.draws)):
                self._states.append([one.get_state() for one in self._generators])
                ahead.append(self.of_row(schedule, row, latents, latents.dtype, generator))
            self._ahead = ahead

    def rewind(self, rows: int) -> None:
        """Only so many rows ran (an interrupt, an error): leave the generators where stock's would be, the later draws not made."""
        if rows < len(self._ahead):
            for one, state in zip(self._generators, self._states[rows], strict=True):
                one.set_state(state)

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
