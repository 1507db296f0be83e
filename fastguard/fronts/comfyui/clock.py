"""Noise levels of ComfyUI's models as timesteps and weights."""

from __future__ import annotations

from typing import Any

import torch


class Clock:
    """Timesteps and noise levels of a model's `model_sampling`.

    in_steps: whether its timesteps count training steps, as t_star and deadline do. Fractions of the whole are taken as thousandths.
    """

    def __init__(self, sampling: Any) -> None:
        self._sampling = sampling
        last, first = (float(sampling.timestep(torch.as_tensor(s))) for s in (sampling.sigma_min, sampling.sigma_max))
        fractions = 0.0 <= last < first <= 1.0
        self._factor = 1000.0 if fractions else 1.0
        self.in_steps = fractions or (last >= 0.0 and first >= 10.0)
        self._flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._sampling.timestep(sigma) * self._factor

    def weights(self, sigma: float) -> tuple[float, float]:
        """Factors of d in epsilon and in x0 space."""
        return ((1.0 - sigma) ** 2 if self._flow else 1.0), sigma**2
