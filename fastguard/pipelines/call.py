"""One guarded call of the fused kind: what happens between the stock loop and the fused op.

The stock `__call__` runs unchanged on a stand-in of the pipeline that holds shadows of its scheduler and denoiser. Per row it calls

    scheduler.scale_model_input(x)  ->  the model input, already written by the last row where nobody can have changed it since
    denoiser(...)                   ->  the whole row: one batched call, decision, guidance, update; the pipeline gets a placeholder
    scheduler.step(..., x)          ->  x' goes back to the pipeline; the scheduler's own step() where it is not linear

What the loop needs is on the device before its first row (`begin`); in it the host neither waits nor copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastguard.capture.obstacles import watched
from fastguard.capture.runner import Arguments, BodyRunner
from fastguard.loop.report import Report
from fastguard.pipelines.attached import Attached
from fastguard.pipelines.families import Family
from fastguard.pipelines.generation import Generation
from fastguard.pipelines.guidance import Guidance
from fastguard.pipelines.outputs import Output, placeholder, select_branch
from fastguard.pipelines.scheduler import Step
from fastguard.policies.policy import Policy


class Call(Attached):
    """`generation` is None until the loop begins."""

    def __init__(
        self,
        policy: Policy,
        family: Family,
        arguments: Mapping[str, Any],
        pipe: Any,
        denoiser: Callable[..., Any],
        runner: BodyRunner,
        *,
        unguided: str,
    ) -> None:
        """arguments: of the pipeline's call, by name; denoiser: the pipeline's, as it shall run."""
        self.family, self.denoiser, self.runner = family, denoiser, runner
        callback = any(arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))
        # Somebody may look at, keep or change the latents between two rows.
        self.open = callback or family.rewrites_latents
        super().__init__(
            pipe,
            arguments,
            {family.denoiser: self.denoise},
            callback=callback,
            scales_input=family.scales_input,
            steps={"scale_model_input": self.scale_model_input},
        )
        self.guidance = Guidance(policy, family, arguments, self.stand_in, unguided)
        # Hooks may keep the model inputs that they see, of which the loop has one buffer.
        self.watched = any(watched(getattr(pipe, name, None)) for name in (family.denoiser, "controlnet"))
        self.generation: Any = None  # Generation
        self._input: torch.Tensor | None = None  # what the denoiser is about to be given
        self._ran = False  # the denoiser, for the step that follows
        self._cond: torch.Tensor | None = None

    # The loop begins -------------------------------------------------------------------------------------------------------

    def _begun(self, shown: torch.Tensor, timestep: Any) -> Generation:
        """The generation; begun at this row if it has not begun before."""
        if self.generation is None:
            halves = 2 if self.guidance.on else 1
            first = shown[: len(shown) // halves] if self.prepared is None else self.prepared
            self.begin(first, self.scheduling.begin_at(timestep))
        return self.generation

    def begin(self, latents: torch.Tensor, row: int) -> None:
        guidance, scheduling, pipe = self.guidance, self.scheduling, self.stand_in
        own_step = guidance.own_step(len(scheduling.scheduler.timesteps))
        schedule = scheduling.compile(row, own_step, pipe)
        plan = guidance.begin(schedule, latents, scheduling.rows_of_the_loop())
        whole = self.runner.wants_whole(latents.device) and self._may_be_whole()
        self.generation = Generation(
            schedule, plan, latents, self.denoiser, self.runner, halves=2 if guidance.on else 1, whole=whole
        )
        # A generator in host memory would stop every row for a copy. Not where somebody may use it between two rows, nor where
        # fewer rows than the table's will run.
        if not self.open and self.arguments.get("denoising_end") is None and scheduling.passes_generator(pipe):
            self.generation.noise.draw_ahead(schedule, latents, self.arguments.get("generator"))

    def _may_be_whole(self) -> bool:
        """Whether the rows can run at once; else each of them may still be a graph."""
        obstacles = {
            "only Stable Diffusion and SDXL text-to-image run as a whole": self.family.name != "text-to-image",
            "a callback looks at every step": self.open,
            "denoising_end ends the loop early": self.arguments.get("denoising_end") is not None,
            self.scheduling.schedule.reason: not self.scheduling.schedule.linear,
        }
        obstacle = next((why for why, there in obstacles.items() if there), None)
        if obstacle is not None:
            self.runner.reason = f"capture='loop' became 'step': {obstacle}"
        return obstacle is None

    # One row ---------------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        generation = self._begun(sample, timestep)
        # Of the first one of a row: a ControlNet in guess mode has its own input scaled, too, of the conditional branch alone.
        if self._input is None:
            self._take(generation, sample)
        if generation.schedule.linear:
            self._input = self._model_input(generation, sample)
        else:
            self._input = self.scheduling.scheduler.scale_model_input(sample, timestep, *args, **kwargs)
        return self._input

    def _take(self, generation: Generation, shown: torch.Tensor) -> None:
        """The latents that the pipeline shows, where the loop has not got them: the first ones, those that somebody may have changed,
        and, for anchors, those that the scheduler's own step() made."""
        linear = generation.schedule.linear
        wanted = self.open or generation.row == 0 if linear else generation.loop.anchor is not None
        if wanted and not generation.over:
            generation.take(shown[:, : generation.loop.x.shape[1]], 2 if self.guidance.on else 1)

    def _model_input(self, generation: Generation, shown: torch.Tensor) -> torch.Tensor:
        """Of the next row, whose latents the pipeline shows as a batch of B or 2B rows."""
        ready = generation.loop.model_input
        if generation.over:
            return shown
        if not generation.schedule.linear or self.open or generation.row == 0 or ready.shape != shown.shape:
            ready = generation.model_input(shown)
        return ready.clone() if self.watched else ready

    def denoise(self, *args: Any, **kwargs: Any) -> Output:
        """Run the row that the pipeline has come to, on the branches that it needs; return a placeholder of the full batch."""
        name = self.family.sample_argument
        shown = args[0] if args else kwargs[name]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if not self.family.scales_input:
            self._input = shown
        if self._input is None:
            raise RuntimeError(
                f"{self.family.denoiser} was called outside its turn in a guarded loop (by a callback?); call that of the original pipeline"
            )
        generation = self._begun(shown, timestep)
        self._input, self._ran = None, True
        if generation.over:
            return Output((placeholder(generation.loop.model_input, len(shown)),))
        plan = self._follow(generation)
        if not self.family.scales_input:
            self._take(generation, shown)
            shown = self._model_input(generation, shown)
            args, kwargs = ((shown, *args[1:]), kwargs) if args else (args, {**kwargs, name: shown})
        arguments: Arguments = args, kwargs
        generator = self.arguments.get("generator") if self.scheduling.passes_generator(self.stand_in) else None
        if generation.whole:
            generation.run_all(arguments, plan, generator)
        else:
            branches, batch = plan[generation.row], len(generation.loop.x)
            if branches != "both" and len(shown) == 2 * batch:
                arguments = select_branch(arguments, branches, batch)
            keeps = self.guidance.rescale > 0.0
            self._cond = generation.run_row(arguments, branches, generator, look_again=self.open, keeps_cond=keeps)
        return Output((placeholder(generation.loop.model_input, len(shown)),))

    def _follow(self, generation: Generation) -> tuple[str, ...]:
        """What the caller's code may have changed since the last row; the branches of all rows, as things are now."""
        self.scheduling.check_unchanged()
        if self.guidance.changed():
            generation.loop.load_plan(self.guidance.plan)
        guided = self.guidance.check(generation.row, generation.schedule)
        return self.guidance.branches if guided else ("cond",) * len(generation.schedule.timesteps)

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._ran:
            raise RuntimeError("scheduler.step was called without a denoiser call before it")
        self._ran = False
        self.scheduling.check_arguments(kwargs)
        generation, scheduling = self.generation, self.scheduling
        if not generation.schedule.linear:
            # A copy: some schedulers keep what they are given, and the next row writes into x.
            guided = self.guidance.rescaled(generation.loop.latents(), self._cond)
            return scheduling.own_step(guided, timestep, sample, *args, **kwargs)
        scheduling.keep_step_index(generation.row)
        latents = generation.loop.latents()
        return (latents,) if not kwargs.get("return_dict", True) else Step(prev_sample=latents)

    # After it --------------------------------------------------------------------------------------------------------------

    def report(self) -> Report | None:
        generation = self.generation
        if generation is None:
            return None
        path = "fused" if generation.schedule.linear else "own step"
        if self.runner.replayed:
            path += ", loop graph" if generation.whole else ", step graph"
        reasons = (generation.schedule.reason, self.guidance.reason, self.runner.reason)
        return Report(
            generation.loop,
            self.guidance.plan,
            rows_run=generation.rows_run,
            latents=generation.loop.x if self.scheduling.stepped is None else self.scheduling.stepped,
            path=path,
            reason="; ".join(filter(None, reasons)) or None,
        )

    def close(self) -> None:
        if self.generation is not None:
            self.generation.noise.rewind(self.generation.row)
        self.runner.give_back()
