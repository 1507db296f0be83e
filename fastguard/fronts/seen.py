"""What a guider sees of the loop that asks it: timesteps; the noise levels, where it was given the scheduler; the model's input, by a hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastguard.kernels.layout import Row
from fastguard.loop.guide import Guide
from fastguard.loop.stepwise import Stepwise
from fastguard.policies.plan import limit
from fastguard.policies.policy import Policy
from fastguard.schedules.compiler import compile_schedule


class Seen:
    def __init__(self) -> None:
        self._shown: Any = None  # the model's last input
        self._scales: list[float] = []  # of the model's input in the rows of this run
        self._hook: Any = None

    def watch(self, denoiser: torch.nn.Module) -> None:
        """Until `leave`."""

        def see(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            self._shown = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))

        self._hook = denoiser.register_forward_pre_hook(see, with_kwargs=True)

    def leave(self) -> None:
        if self._hook is not None:
            self._hook = self._hook.remove()

    def begin(
        self, scheduler: Any, policies: Sequence[Policy], scale: float, pred: torch.Tensor, timestep: Any
    ) -> Guide:
        """The guide of a run with that scheduler (None: not known), whose first row has the timestep and predictions like `pred`.

        With a scheduler on a GPU the host waits here for its timesteps, once a run. ValueError where a policy needs what is not seen.
        """
        if scheduler is not None:
            schedule = compile_schedule(scheduler)
            self._scales = schedule.rows[:, Row.S].tolist()
            return Guide(policies, schedule, guidance_scale=scale, latents=pred)
        for one in policies:
            what = "is anchored" if one.anchored else f"has magnitude={one.magnitude!r}"
            if one.anchored or one.magnitude != "output":
                raise ValueError(
                    f"policy {one.name!r} {what}, which needs noise levels: set guider.scheduler = pipe.scheduler"
                )
            if timestep is None and (last := limit(one)) is not None:
                raise ValueError(f"policy {one.name!r} ends at timestep {last:g}: call set_state before the first row")
        return Stepwise(policies, guidance_scale=scale, latents=pred)

    def row(self, guide: Guide, pred: torch.Tensor, timestep: Any) -> torch.Tensor | None:
        """The latents of the next row, where the guide needs them."""
        if isinstance(guide, Stepwise):
            guide.at(*((guide.row, torch.nan) if timestep is None else (-timestep, timestep)))
            return None
        if not guide.plan.anchored:
            return None
        if self._shown is None or self._shown.shape[1] < pred.shape[1]:
            raise RuntimeError(
                "anchored policies need the latents: the loop must call the guider's prepare_models and cleanup_models around the model"
            )
        # A model may be shown more than the latents: a picture's channels, or its tokens.
        return self._shown[:, : pred.shape[1]] / self._scales[guide.row]
