"""The guidance of one call: its policies lowered to a plan, and what the pipeline says of guidance while its loop runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastguard.pipelines.families import Family
from fastguard.pipelines.outputs import undivided
from fastguard.pipelines.scheduler import Scheduling
from fastguard.policies.plan import Plan, lower, of_images, unfit_guards
from fastguard.policies.policy import Policy


class Guidance:
    """`pipe` is the copy on which the stock loop runs, set by the call; a callback may change its guidance between two rows.

    plan: None until `planned`.
    """

    def __init__(self, policy: Policy, family: Family, arguments: Mapping[str, Any], scheduling: Scheduling) -> None:
        self.policy, self.family, self.arguments, self.scheduling = policy, family, arguments, scheduling
        self.pipe: Any = None
        self.plan: Any = None  # Plan
        self._was_on = True  # the row before ran with guidance

    @property
    def on(self) -> bool:
        """Whether the pipeline runs both branches right now."""
        return self.family.guided(self.pipe, self.arguments)

    @property
    def rescale(self) -> float:
        return self.family.guidance_rescale(self.pipe, self.arguments)

    @property
    def own_step(self) -> str | None:
        """Why the scheduler's own step() must run on the guided output, whatever the table can do."""
        reason = self.family.own_step(self.arguments, len(self.scheduling.scheduler.timesteps))
        if reason is None and self.rescale > 0.0:
            reason = f"guidance_rescale={self.rescale:g} needs the whole guided output before the update"
        return reason

    def planned(self, latents: torch.Tensor, batch: int) -> Plan:
        """The plan of this call; made at its first row, of whose `batch` images `latents` (or the model's input) has the size."""
        if self.plan is None:
            per_prompt = self.arguments.get("num_images_per_prompt") or 1
            autoencoder = getattr(self.pipe, "vae", None)  # a pipeline that returns latents may have none
            channels = latents.shape[1] if autoencoder is None else autoencoder.config.latent_channels
            self._samples = of_images(self.policy, batch, per_prompt)
            self._elements = channels * latents[0, 0].numel()
            self.plan = plan = self._lower()
            for sentence in unfit_guards(plan, self.scheduling.rows_of_the_loop()):
                warnings.warn(sentence, stacklevel=2)
        return self.plan

    def changed(self) -> bool:
        """Whether a callback has changed the guidance scale; the plan's rows still to come have the new one then."""
        if self.family.guidance_scale(self.pipe, self.arguments) == self._scale:
            return False
        self.plan = self._lower()
        return True

    def check(self, row: int) -> bool:
        """`on` at this row. Refuses a guard over a call without guidance; warns if guidance ends before the guard does."""
        on = self.on
        if not on and row == 0 and (self.policy.guarded or self.policy.sets_scale):
            raise ValueError(
                f"guidance_scale={self.arguments.get('guidance_scale')!r}: the pipeline runs no unconditional branch then, but policy "
                f"{self.policy.name!r} needs it; pass a guidance_scale above 1 to a model with classifier-free guidance, or use 'cfg' "
                f"without a scale of its own"
            )
        if not on and row > 0 and self.policy.guarded and self._was_on:
            warnings.warn(
                f"guidance was switched off at denoiser row {row} (by a callback): the guard ends with it, and an image that has "
                f"not reached its transition gets the conditional branch alone, which copies",
                stacklevel=2,
            )
        self._was_on = on
        if self.rescale > 0.0 and self.scheduling.schedule.linear:
            raise RuntimeError("guidance_rescale was switched on during a guarded call, which had begun without it")
        return on

    def rescaled(self, guided: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        """guidance_rescale of Lin et al. 2023 (arXiv 2305.08891, section 3.4): pull the standard deviation back to cond's."""
        phi = self.rescale
        if phi <= 0.0 or cond is None:
            return guided
        dims = tuple(range(1, guided.ndim))
        rescaled = guided * (cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True))
        return phi * rescaled + (1 - phi) * guided

    def _lower(self) -> Plan:
        self._scale = self.family.guidance_scale(self.pipe, self.arguments)
        plan = lower(self._samples, self.scheduling.schedule, self._scale, self._elements)
        if undivided(getattr(self.pipe, self.family.denoiser), self.arguments):
            plan = replace(plan, branches=("both",) * len(plan.branches))
        return plan
