"""Static buffers of one generation and the body of its steps, around the fused op. Knows nothing of pipelines."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastguard.kernels.arguments import Operands, memory_format
from fastguard.kernels.guided_step import guided_step, history_for, scratch_for
from fastguard.kernels.layout import Row, Rule, State
from fastguard.policies.plan import Plan
from fastguard.schedules.schedule import Schedule

_GRAIN = 64  # rows are allocated in multiples of it, so that one graph of a step serves every schedule that fits


class LoopShape(NamedTuple):
    """All that the addresses and sizes of a loop's tensors depend on: a loop of an equal shape may be loaded anew."""

    shape: tuple[int, ...]  # of the latents [B, C, *S]
    stride: tuple[int, ...]
    dtype: torch.dtype  # of the latents as they come and as the denoiser takes them
    device: torch.device
    halves: int  # 2 where the denoiser runs both branches, else 1
    history: int  # slots that the scheduler needs
    draws: int  # noise tensors kept at once
    noise_dtype: torch.dtype
    timestep_dtype: torch.dtype
    rows: int  # capacity in denoiser evaluations
    anchored: bool  # whether some image needs an anchor

    @classmethod
    def of(cls, schedule: Schedule, plan: Plan, latents: torch.Tensor, *, halves: int = 2, draws: int = 1) -> LoopShape:
        """draws: at most so many, and no more than the schedule makes."""
        return cls(
            tuple(latents.shape),
            latents.stride(),
            latents.dtype,
            latents.device,
            halves,
            schedule.history,
            min(draws, sum(map(bool, schedule.draws))),
            schedule.noise_dtype or latents.dtype,
            schedule.timesteps.dtype,
            -(-len(schedule.timesteps) // _GRAIN) * _GRAIN,
            plan.anchored,
        )


class Loop:
    """The latents of B samples on their way through one schedule.

    x            float32 [B, C, *S]: the latents, in the memory format of the first ones (contiguous if they have none)
    history      float32 [L, B, C, *S]: earlier folded model outputs, L as the scheduler needs (0 to 3)
    model_input  dtype of the latents [halves * B, C, *S]: the next denoiser input, scaled
    timestep     [halves * B], the scheduler's dtype: the next denoiser input's timestep; only a whole generation reads it
    noise        [draws, B, C, *S]: what the scheduler adds, to be drawn before the rows that need it
    trace        float32 [rows, B]: d = ||cond - uncond||^2 of every row, NaN where one branch did not run
    state        float64 [B, len(State)]
    anchor       float32 [2, B, C, *S]: the first predictions x0(c) and x0(u) of anchored images; None if there are none
    shares       as trace: how much of the guidance leads to the anchor; None without one

    All of them keep their addresses, also when another generation is loaded, and the step counter lies in `state`: one body serves
    every step of every generation of the same `LoopShape`.
    """

    def __init__(self, schedule: Schedule, plan: Plan, latents: torch.Tensor, shape: LoopShape | None = None) -> None:
        shape = shape or LoopShape.of(schedule, plan, latents)
        batch, device, layout = latents.shape[0], latents.device, memory_format(latents)
        self.dtype = latents.dtype
        self.x = torch.empty_like(latents, dtype=torch.float32, memory_format=layout)
        self.history = history_for(self.x, shape.history)
        self.scratch = scratch_for(self.x)
        doubled = (shape.halves * batch, *latents.shape[1:])
        self.model_input = torch.empty(doubled, dtype=latents.dtype, device=device, memory_format=layout)
        self.timestep = torch.empty(shape.halves * batch, dtype=shape.timestep_dtype, device=device)
        self.noise = torch.empty((shape.draws, *latents.shape), dtype=shape.noise_dtype, device=device)
        self.trace = torch.empty(shape.rows, batch, dtype=torch.float32, device=device)
        self.anchor = history_for(self.x, 2) if shape.anchored else None
        self.shares = torch.empty_like(self.trace) if shape.anchored else None
        self.rows = torch.zeros(shape.rows + 1, len(Row), dtype=torch.float64, device=device)
        self.state = torch.empty(batch, len(State), dtype=torch.float64, device=device)
        self.rules = torch.empty(batch, len(Rule), dtype=torch.float64, device=device)
        self.guidance = torch.zeros(batch, shape.rows, 2, dtype=torch.float32, device=device)
        self.load(schedule, plan, latents)

    def load(self, schedule: Schedule, plan: Plan, latents: torch.Tensor) -> None:
        """Begin a generation. Tables come from the host once, here; nothing is copied afterwards."""
        self.x.copy_(latents)
        self.model_input.unflatten(0, (-1, len(latents))).copy_(latents)
        self.history.zero_()
        self.trace.fill_(float("nan"))
        if self.shares is not None:
            self.shares.fill_(float("nan"))
        self.rows[: len(schedule.rows)].copy_(schedule.rows, non_blocking=True)
        self.state.copy_(plan.state, non_blocking=True)
        self.timestep.fill_(float(schedule.rows[0, Row.TIMESTEP]))
        self.load_plan(plan)

    def load_plan(self, plan: Plan) -> None:
        """Take new guidance and rules (a callback changed the guidance scale); counters, history and anchors stay."""
        self.rules.copy_(plan.rules, non_blocking=True)
        self.guidance[:, : plan.guidance.shape[1]].copy_(plan.guidance, non_blocking=True)

    def load_latents(self, latents: torch.Tensor) -> None:
        """Other latents than the last step's. Elements that still are the last step's in the caller's dtype keep their float32."""
        self.x.copy_(torch.where(latents == self.x.to(latents.dtype), self.x, latents.float()))

    def advance(
        self,
        uncond: torch.Tensor,
        cond: torch.Tensor | None,
        noise: torch.Tensor | None = None,
        *,
        combined: torch.Tensor | None = None,
    ) -> None:
        """One step: squared norm, decision, guidance, scheduler update, next model input.

        cond      None where one branch ran
        combined  the caller's own guided output, for the images that are not guarded at this row
        """
        # In the order of the op's operands.
        held = (self.x, self.history, self.model_input, self.trace, self.state, self.rows, self.rules, self.guidance)
        rest = (self.timestep, self.anchor, self.shares, self.scratch)
        guided_step(Operands(uncond, cond, *held, combined, noise, *rest))

    def latents(self) -> torch.Tensor:
        """A copy of the latents in the dtype in which they came."""
        return self.x.to(self.dtype, copy=True)

    @property
    def changed(self) -> list[torch.Tensor]:
        """What a step writes."""
        held = [tensor for tensor in (self.anchor, self.shares) if tensor is not None]
        return [self.x, self.history, self.model_input, self.trace, self.state, self.timestep, *held]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.changed, self.rows, self.rules, self.guidance, self.noise, self.scratch]

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors)
