"""A `Loop` whose tensors are made once and loaded anew for every generation, so that a graph over them can be kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastguard.kernels.arguments import memory_format
from fastguard.kernels.guided_step import history_for, scratch_for
from fastguard.kernels.layout import Row, Rule, State
from fastguard.loop.loop import Loop
from fastguard.policies.plan import Plan
from fastguard.schedules.schedule import Schedule

_GRAIN = 64  # capacities are multiples of it: one graph of a step serves every schedule that fits


@dataclass(frozen=True)
class LoopShape:
    """All that the addresses and sizes of a loop's tensors depend on.

    shape, stride    of the latents [B, C, *S]; dtype as they come (and as the denoiser takes them)
    halves           2 where the denoiser runs both branches, else 1
    history          slots that the scheduler needs
    noises           draws kept at once: 0, 1 (a step at a time), or as many as the schedule makes (whole generation)
    rows             capacity in denoiser evaluations
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    halves: int
    history: int
    noises: int
    noise_dtype: torch.dtype
    timestep_dtype: torch.dtype
    rows: int

    @classmethod
    def of(
        cls,
        latents: torch.Tensor,
        schedule: Schedule,
        *,
        halves: int,
        whole: bool,
        noise_dtype: torch.dtype,
    ) -> LoopShape:
        draws = sum(map(bool, schedule.draws))
        return cls(
            tuple(latents.shape),
            latents.stride(),
            latents.dtype,
            latents.device,
            halves,
            schedule.history,
            draws if whole else min(draws, 1),
            noise_dtype,
            schedule.timesteps.dtype,
            -(-len(schedule.timesteps) // _GRAIN) * _GRAIN,
        )


class StaticLoop(Loop):
    """The tensors of `Loop`, and besides

    noise      [noises, B, C, *S]: what the scheduler will add, drawn before the rows that need it
    timestep   [halves * B]: the next denoiser input's timestep, written by every step; only a whole generation reads it
    """

    def __init__(self, shape: LoopShape) -> None:
        device, batch = shape.device, shape.shape[0]
        self.dtype = shape.dtype
        latents = torch.empty_strided(shape.shape, shape.stride, device="meta")
        layout = memory_format(latents)
        self.x = torch.empty(shape.shape, dtype=torch.float32, device=device, memory_format=layout)
        self.history = history_for(self.x, shape.history)
        self.scratch = scratch_for(self.x)
        self.model_input = torch.empty(
            (shape.halves * batch, *shape.shape[1:]),
            dtype=shape.dtype,
            device=device,
            memory_format=layout,
        )
        self.trace = torch.empty(shape.rows, batch, dtype=torch.float32, device=device)
        self.rows = torch.zeros(shape.rows + 1, len(Row), dtype=torch.float64, device=device)
        self.state = torch.empty(batch, len(State), dtype=torch.float64, device=device)
        self.rules = torch.empty(batch, len(Rule), dtype=torch.float64, device=device)
        self.guidance = torch.zeros(batch, shape.rows, 2, dtype=torch.float32, device=device)
        self.noise = torch.empty((shape.noises, *shape.shape), dtype=shape.noise_dtype, device=device)
        self.timestep: torch.Tensor = torch.zeros(shape.halves * batch, dtype=shape.timestep_dtype, device=device)

    def load(self, schedule: Schedule, plan: Plan, latents: torch.Tensor) -> None:
        """Begin a generation. The model input of the first row is not written here."""
        self.x.copy_(latents)
        self.history.zero_()
        self.trace.fill_(float("nan"))
        self.rows[: len(schedule.rows)].copy_(schedule.rows, non_blocking=True)
        self.state.copy_(plan.state, non_blocking=True)
        self.timestep.fill_(float(schedule.rows[0, Row.TIMESTEP]))
        self.load_plan(plan)

    def load_plan(self, plan: Plan) -> None:
        self.rules.copy_(plan.rules, non_blocking=True)
        self.guidance[:, : plan.guidance.shape[1]].copy_(plan.guidance, non_blocking=True)

    def load_latents(self, latents: torch.Tensor) -> None:
        """Other latents than the last step's. Elements that still are the last step's in the caller's dtype keep their float32."""
        self.x.copy_(torch.where(latents == self.x.to(latents.dtype), self.x, latents.float()))

    @property
    def changed(self) -> list[torch.Tensor]:
        """What a step writes."""
        return [self.x, self.history, self.model_input, self.trace, self.state, self.timestep]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.changed, self.rows, self.rules, self.guidance, self.noise, self.scratch]

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)
