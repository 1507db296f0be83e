"""One guarded call of the fused kind: what happens between the stock loop and the fused op.

The stock `__call__` runs unchanged on a stand-in of the pipeline that holds shadows of its scheduler and denoiser. Per row it calls

    scheduler.scale_model_input(x)  ->  the model input, already written by the last row where nobody can have changed it since
    denoiser(...)                   ->  the whole row: one batched call, decision, guidance, update; the pipeline gets a placeholder
    scheduler.step(..., x)          ->  x' goes back to the pipeline; the scheduler's own step() where it is not linear

What the loop needs is on the device before its first row (`begin`); in it the host neither waits nor copies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from fastguard.capture.obstacles import hooks
from fastguard.capture.runner import BodyRunner
from fastguard.loop.report import Report
from fastguard.pipelines.attached import Attached
from fastguard.pipelines.families import parts_of
from fastguard.pipelines.families.fused import Fused, Said
from fastguard.pipelines.generation import Generation
from fastguard.pipelines.outputs import Output, needs_both
from fastguard.pipelines.scheduler import Step
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule

INPUT, DENOISER, STEP = "input", "denoiser", "step"  # what a row has come to


class Call(Attached):
    """`guide` is the `Generation`."""

    family: Fused
    said: Said  # of guidance, by the pipeline, at this row

    def __init__(
        self,
        policy: Policy,
        family: Fused,
        arguments: Mapping[str, Any],
        pipe: Any,
        runner: BodyRunner,
        *,
        unguided: str,
    ) -> None:
        super().__init__(policy, family, arguments, pipe, unguided=unguided)
        self.runner = runner
        # Somebody may look at, keep or change the latents between two rows.
        self.open = self.scheduling.callback or family.rewrites_latents
        # Hooks may keep the model inputs that they see, of which the loop has one buffer.
        parts = parts_of(pipe, (*family.denoisers, "controlnet")).values()
        self.watched = any(hooks(m for part in parts if isinstance(part, torch.nn.Module) for m in part.modules()))
        self._at = STEP
        self._cond: torch.Tensor | None = None

    # The loop begins -------------------------------------------------------------------------------------------------------

    def begin(self, latents: torch.Tensor, row: int) -> None:
        self.said = self.family.guidance(self.stand_in, self.arguments)
        if not self.said.on:
            self.refuse_unguided()
        single = 1 in (len(self.scheduling.scheduler.timesteps), self.arguments.get("num_inference_steps"))
        own_step = None
        if single and self.family.reads_x0:
            own_step = "a single step: the pipeline reads pred_original_sample from the scheduler"
        elif self.said.rescale > 0.0:
            own_step = f"guidance_rescale={self.said.rescale:g} needs the whole guided output before the update"
        self.guide_by(self._generation, latents, row, own_step)
        self._keeps_both: str | None = None  # why
        if self.said.on and any(branch != "both" for branch in self.guide.plan.branches):
            (original,) = self.denoisers.values()
            self._keeps_both = needs_both(original, self.arguments)
        if self._keeps_both is not None:
            self.reasons.append(f"both branches run in every row: {self._keeps_both}")
        self._branches = self._needed()
        # A generator in host memory would stop every row for a copy. Not where somebody may use it between two rows, nor where
        # fewer rows than the table's will run.
        if "generator" in self.scheduling.promised and not self.open and self.arguments.get("denoising_end") is None:
            self.guide.noise.draw_ahead(self.guide.schedule, latents, self.guide.generator)

    def _generation(self, policies: list[Policy], schedule: Schedule, latents: torch.Tensor) -> Generation:
        return Generation(
            policies,
            schedule if self.family.scales_input else schedule.unscaled(),
            self.runner,
            guidance_scale=self.said.scale,
            latents=latents,
            generator=self.scheduling.promised.get("generator"),
            look_again=self.open,
            halves=2 if self.said.on else 1,
            whole=self.runner.wants_whole(latents.device) and self._may_be_whole(schedule),
        )

    def _may_be_whole(self, schedule: Schedule) -> bool:
        """Whether the rows can run at once; else each of them may still be a graph."""
        obstacles = {
            "only Stable Diffusion and SDXL text-to-image run as a whole": self.family.name != "text-to-image",
            "a callback looks at every step": self.open,
            "denoising_end ends the loop early": self.arguments.get("denoising_end") is not None,
            schedule.reason: not schedule.linear,
        }
        obstacle = next((why for why, there in obstacles.items() if there), None)
        if obstacle is not None:
            self.runner.reason = f"capture='loop' became 'step': {obstacle}"
        return obstacle is None

    def _needed(self) -> tuple[str, ...]:
        """What each row runs, as things are now. Rescaling needs the conditional output even where guidance does not."""
        branches: tuple[str, ...] = self.guide.plan.branches
        if not self.said.on:
            return ("cond",) * len(branches)
        return ("both",) * len(branches) if self._keeps_both is not None or self.said.rescale > 0.0 else branches

    # One row ---------------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The denoiser's input for the latents that the pipeline shows. The loop takes those where it has not got them: the first ones,
        those that somebody may have changed, and, for anchors, those that the scheduler's own step() made."""
        if self.guide is None:
            self.begin(self._latents, self.scheduling.row_of(timestep))
        run = self.guide
        # A row's first: a ControlNet in guess mode has its own input scaled, too, of the conditional branch alone.
        first, self._at = self._at != INPUT, INPUT
        if run.row == len(run.plan.timesteps):
            return sample
        if first and self.scheduling.callback:
            self.scheduling.check_unchanged()
        if first and (said := self.family.guidance(self.stand_in, self.arguments)) != self.said:
            self._follow(said)
        linear, ready = run.schedule.linear, run.loop.model_input
        new = self.open or run.row == 0
        if first and (new if linear else run.loop.anchor is not None):
            run.take(sample[:, : run.loop.x.shape[1]], 2 if self.said.on else 1)
        if not linear and self.family.scales_input:
            return self.scheduling.scheduler.scale_model_input(sample, timestep, *args, **kwargs)
        if new or not linear or ready.shape != sample.shape:
            ready = run.model_input(sample)
        return ready.clone() if self.watched else ready

    def denoise(self, name: str, *args: Any, **kwargs: Any) -> Output:
        """Run the row that the pipeline has come to, on the branches that it needs; return a placeholder of the full batch."""
        argument = self.family.sample_argument
        shown = args[0] if args else kwargs[argument]
        if not self.family.scales_input:
            shown = self.scale_model_input(shown, kwargs["timestep"] if "timestep" in kwargs else args[1])
            args, kwargs = ((shown, *args[1:]), kwargs) if args else (args, {**kwargs, argument: shown})
        if self._at != INPUT:
            raise RuntimeError(
                f"{name} was called outside its turn in a guarded loop (by a callback?); call that of the original pipeline"
            )
        self._at = DENOISER
        run = self.guide
        if run.row < len(run.plan.timesteps):
            cut, keeps_cond = len(shown) == 2 * len(run.loop.x), self.said.rescale > 0.0
            self._cond = run.run_row((args, kwargs), self._branches, cut=cut, keeps_cond=keeps_cond)
        # For the pipeline's own guidance arithmetic, whose result is ignored; in host memory, where it launches nothing.
        shape = (len(shown), run.loop.x.shape[1], *[1] * (run.loop.x.ndim - 2))
        return Output((torch.zeros(shape, dtype=run.loop.dtype),))

    def _follow(self, said: Said) -> None:
        """A callback has changed what the pipeline says."""
        self.guide.follow(said.scale)
        if self.said.on and not said.on and self.guide.row > 0:
            self.warn_of_its_end()
        if said.rescale > 0.0 and self.guide.schedule.linear:
            raise RuntimeError("guidance_rescale was switched on during a guarded call, which had begun without it")
        self.said = said
        self._branches = self._needed()

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._at != DENOISER:
            raise RuntimeError("scheduler.step was called without a denoiser call before it")
        run, scheduling, self._at = self.guide, self.scheduling, STEP
        if run.row == 1 or run.whole:  # the same in every row of a loop
            scheduling.check_arguments(kwargs)
        # A copy: some schedulers keep what they are given, and the next row writes into x.
        latents = run.loop.x.to(run.loop.dtype, copy=True)
        if not run.schedule.linear:
            if self._cond is not None and self.said.rescale > 0.0:
                latents = rescale_noise_cfg(latents, self._cond, self.said.rescale)
            return scheduling.own_step(latents, timestep, sample, *args, **kwargs)
        scheduling.stepped = latents
        if hasattr(scheduling.scheduler, "_step_index"):  # which add_noise looks at, in inpaint pipelines
            scheduling.scheduler._step_index = scheduling.first_row + run.row
        return (latents,) if not kwargs.get("return_dict", True) else Step(prev_sample=latents)

    def report(self) -> Report | None:
        if self.guide is not None:
            graph = f", {'loop' if self.guide.whole else 'step'} graph" if self.runner.replayed else ""
            self.path = ("fused" if self.guide.schedule.linear else "own step") + graph
            self.reasons = [self.guide.schedule.reason, *self.reasons, self.runner.reason]
        return super().report()

    def close(self) -> None:
        if self.guide is not None:
            self.guide.noise.rewind(self.guide.row)
        self.runner.give_back()
