"""Static buffers of one generation and the body of its steps, around the fused op. Knows nothing of pipelines."""

from __future__ import annotations

import torch

from fastguard.kernels.arguments import memory_format
from fastguard.kernels.guided_step import guided_step, history_for, scratch_for
from fastguard.policies.plan import Plan
from fastguard.schedules.schedule import Schedule


class Loop:
    """The latents of B samples on their way through one schedule.

    x            float32 [B, C, *S]: the latents, in the memory format of the first ones (contiguous if they have none)
    history      float32 [L, B, C, *S]: earlier folded model outputs, L as the scheduler needs (0 to 3)
    model_input  model dtype [halves * B, C, *S]: the next denoiser input, scaled
    trace        float32 [K, B]: d = ||cond - uncond||^2 of every row, NaN where one branch did not run
    state        float64 [B, len(State)]

    All of them keep their addresses for the whole generation, and the step counter lives in `state`: one body serves every step.
    """

    timestep: torch.Tensor | None = None  # the next row's, written by every step where a graph reads it

    def __init__(self, schedule: Schedule, plan: Plan, latents: torch.Tensor, *, halves: int) -> None:
        device = latents.device
        self.dtype = latents.dtype
        latents = latents.clone(memory_format=memory_format(latents))
        self.x = latents.to(torch.float32)
        self.history = history_for(self.x, schedule.history)
        self.scratch = scratch_for(self.x)
        self.model_input = torch.cat([latents] * halves)
        self.trace = torch.full(
            (len(schedule.timesteps), latents.shape[0]), float("nan"), dtype=torch.float32, device=device
        )
        # Tables come from the host once, before the first step; nothing is copied afterwards.
        self.rows = schedule.rows.to(device, non_blocking=True)
        self.state = plan.state.to(device, copy=True, non_blocking=True)
        self.load_plan(plan)

    def load_plan(self, plan: Plan) -> None:
        """Take new guidance and rules (a callback changed the guidance scale); counters and history stay."""
        self.rules = plan.rules.to(self.x.device, non_blocking=True)
        self.guidance = plan.guidance.to(self.x.device, non_blocking=True)

    def load_latents(self, latents: torch.Tensor) -> None:
        """Start the next step from other latents than the last step's (a callback or inpaint blending changed them)."""
        self.x.copy_(latents)

    def advance(self, uncond: torch.Tensor, cond: torch.Tensor | None, noise: torch.Tensor | None) -> None:
        """One step: squared norm, decision, guidance, scheduler update, next model input. `cond` is None where one branch ran."""
        guided_step(
            uncond,
            cond,
            x=self.x,
            history=self.history,
            model_input=self.model_input,
            trace=self.trace,
            state=self.state,
            rows=self.rows,
            rules=self.rules,
            guidance=self.guidance,
            noise=noise,
            timestep_out=self.timestep,
            scratch=self.scratch,
        )

    def latents(self, *, fresh: bool) -> torch.Tensor:
        """The latents in the dtype in which they came. Without `fresh` a float32 caller sees the buffer itself."""
        return self.x.to(self.dtype, copy=fresh)
