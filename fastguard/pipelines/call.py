"""One call of a guarded pipeline on the step path: what happens between the stock loop and the fused op.

The stock `__call__` runs unchanged on a copy of the pipeline that holds shadows of its scheduler and denoiser. Per step it calls

    scheduler.scale_model_input(x)  ->  the next model input, already written by the last step where nothing changed it since
    denoiser(...)                   ->  one batched call; its output is kept here, the pipeline sees a placeholder
    scheduler.step(..., x)          ->  the fused op: decision, guidance, update; x' goes back to the pipeline

What the loop needs is on the device before its first step (`begin`); in it the host neither waits nor copies, and outside the
denoiser and the fused op nothing is launched: the latents that the pipeline holds between two steps are `pending`, and its own
guidance arithmetic runs on a few numbers in host memory.

Where the row is recorded as a graph, `fastguard.capture.recorded` runs it between denoiser and step.
Where the scheduler is not linear the op only decides and guides, and the scheduler's own step() runs on the guided output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fastguard.capture import recorded
from fastguard.capture.graphed import Capturing, Graphed
from fastguard.capture.obstacles import watched
from fastguard.kernels.layout import Row
from fastguard.loop.loop import Loop
from fastguard.loop.noise import Noise
from fastguard.loop.report import Report
from fastguard.pipelines.families import Family
from fastguard.pipelines.guidance import Guidance
from fastguard.pipelines.outputs import placeholder, select_branch
from fastguard.pipelines.pending import Pending, values_of
from fastguard.pipelines.scheduler import Scheduling
from fastguard.pipelines.shadow import one_row
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule


class Call:
    """State of one generation. `scheduler` and `denoiser` are the originals behind the pipeline's shadows."""

    def __init__(
        self,
        policy: Policy,
        family: Family,
        arguments: Mapping[str, Any],
        scheduler: Any,
        denoiser: Any,
        capturing: Capturing,
    ) -> None:
        self.family, self.arguments = family, arguments
        callback = any(arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))
        self.scheduling = Scheduling(scheduler, arguments, callback=callback, scales_input=family.scales_input)
        self.denoiser = denoiser
        self.guidance = Guidance(policy, family, arguments, self.scheduling)
        self.graphed = Graphed(capturing, denoiser)
        self._recorded = False  # this row was run by `graphed`
        self.seen: torch.Tensor | None = None  # the latents of this row as the pipeline has them
        self.pipe: Any = None
        # Somebody may look at, keep or change the latents between two steps.
        self.observed = family.rewrites_latents or callback
        self.row = 0
        self.rows_run = 0  # denoiser rows per image so far
        self.loop: Any = None  # Loop; None until the loop begins
        self._returned: torch.Tensor | None = None  # the latents that the buffers hold, as the pipeline knows them
        self._returned_version: float = 0
        self._stepped: torch.Tensor | None = None  # what the scheduler's own step() gave last, where it runs
        self._pending: Pending | None = None
        self.noise = Noise()
        self._placeholder: torch.Tensor | None = None
        self._expected = False  # the loop is about to call the denoiser
        self._outputs: Any = None  # (uncond, cond or None) of a row between denoiser and step

    def attach(self, pipe: Any) -> None:
        """`pipe`: the copy of the pipeline on which the stock loop will run."""
        self.pipe = self.guidance.pipe = pipe
        # Hooks may keep the model inputs that they see, of which the loop has one buffer.
        self.watched = watched(getattr(pipe, self.family.denoiser))
        self.controlnet_watched = watched(getattr(pipe, "controlnet", None))

    # What the shadows call -------------------------------------------------------------------------------------------------

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        result = self.scheduling.set_timesteps(*args, **kwargs)
        if len(self.scheduler.timesteps) and self.graphed.may_be_whole(self.pipe):
            self.graphed.make_whole(self.pipe._execution_device, recorded.needs_steps(self))
            if self.graphed.whole:
                one_row(self.pipe.scheduler)
        return result

    def counted(self, progress_bar: Any) -> Any:
        """The pipeline's progress bar; a generation in one launch is one tick."""

        def bar(iterable: Any = None, total: int | None = None) -> Any:
            return progress_bar(iterable, 1 if self.graphed.whole else total)

        return bar

    def prepare_latents(self, result: Any) -> Any:
        """Remember what the pipeline's prepare_latents returned: the loop will start from it."""
        latents = result[0] if isinstance(result, tuple) else result
        self._returned, self._returned_version = latents, _version(latents)
        return result

    def begin(self) -> None:
        """The loop is about to start: compile the table, allocate the buffers, bring tables and noise to the device.

        Where the first latents or the first row are not known yet, the first step does it.
        """
        begin = self.scheduling.begin_index
        late = hasattr(self.pipe, "get_timesteps") and begin is None
        if self._returned is None or late or not len(self.scheduler.timesteps):
            return
        self.scheduling.compile(begin or 0, self.guidance.own_step)
        self._start(self._returned)
        self._draw_ahead(self._returned)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._expected = True
        schedule = self.compiled(timestep)
        if not schedule.linear:
            return self.scheduler.scale_model_input(sample, timestep, *args, **kwargs)
        if (ready := self._ready_input(sample)) is not None:
            return ready.clone() if self.controlnet_watched else ready
        scale = float(schedule.rows[self.row, Row.S])
        sample = self.seen = values_of(sample)
        return sample if scale == 1.0 else sample * scale

    def denoise(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser on the branches that this row needs, keep its output, return a placeholder of the full batch."""
        if self.family.scales_input and not self._expected:
            raise RuntimeError(
                f"{self.family.denoiser} was called outside its turn in a guarded loop (by a callback?); call that of the original pipeline"
            )
        self._expected = False
        name = self.family.sample_argument
        sample = args[0] if args else kwargs[name]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.compiled(timestep)
        if self.loop is not None:
            self.scheduling.check_unchanged()
            self.follow_guidance_scale()
        ready = self._ready_input(sample)
        if ready is None:
            ready = self.graphed.resident(sample)
        elif self.watched:
            ready = ready.clone()
        if ready is not None:
            args, kwargs = (
                (ready, *args[1:]) if args else args,
                kwargs if args else {**kwargs, name: ready},
            )
        rows = sample.shape[0]
        guided = self.guidance.check(self.row)
        batch = rows // 2 if guided else rows
        branches = self.guidance.planned(sample, batch).branches[self.row] if guided else "cond"
        if guided and self.guidance.rescale > 0.0:
            branches = "both"  # rescaling needs the conditional output even where guidance does not
        if guided and branches != "both" and not self.graphed.whole:
            args, kwargs = (
                select_branch(args, branches, batch),
                select_branch(kwargs, branches, batch),
            )
        if self.graphed.loop is not None:
            self._recorded = recorded.run(self, (args, kwargs), sample, branches, batch)
        if self._recorded:
            return (placeholder(self.graphed.loop.model_input, rows),)

        result = self.denoiser(*args, **kwargs)
        output = result[0]
        self._outputs = tuple(output.chunk(2)) if guided and branches == "both" else (output, None)
        self.rows_run += output.shape[0] // batch
        if self._placeholder is None or len(self._placeholder) != rows:
            self._placeholder = placeholder(output, rows)
        stand_in = self._placeholder
        return (stand_in, *result[1:]) if isinstance(result, tuple) else type(result)(stand_in)

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._outputs is None and not self._recorded:
            raise RuntimeError("scheduler.step was called without a denoiser call before it")
        if self.row == 0 and self.scheduling.compile_again(kwargs, self.guidance.own_step, recorded=self._recorded):
            self.loop = None
        if self._recorded:
            return self._handed_back(self.loop.dtype, None, timestep, sample, args, kwargs)
        if self.loop is None:
            self._start(sample)
        elif not self._unchanged(sample):
            self.loop.load_latents(sample)
        self.follow_guidance_scale()

        channels = sample.shape[1]  # a model may predict more than the latents' channels (a variance)
        uncond, cond = self._outputs
        uncond, cond = uncond[:, :channels], None if cond is None else cond[:, :channels]
        noise = self.noise.of_row(self.schedule, self.row, sample, uncond.dtype, kwargs.get("generator"))
        self.loop.advance(uncond, cond, noise)
        return self._handed_back(uncond.dtype, cond, timestep, sample, args, kwargs)

    def _handed_back(
        self,
        dtype: torch.dtype,
        cond: torch.Tensor | None,
        timestep: Any,
        sample: torch.Tensor,
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """What scheduler.step returns, now that the fused op has run."""
        self.row = len(self.schedule.timesteps) if self.graphed.whole else self.row + 1
        self._outputs, self._recorded = None, False
        if not self.schedule.linear:
            # A copy: some schedulers keep what they are given, and the next step writes into x.
            guided = self.guidance.rescaled(self.loop.x.to(dtype, copy=True), cond)
            result = self.scheduler.step(guided, timestep, sample, *args, **kwargs)
            self._stepped = result[0] if isinstance(result, tuple) else result.prev_sample
            return result

        self.scheduling.keep_step_index(self.row)
        latents = self._latents()
        self._returned, self._returned_version = latents, _version(latents) if self.observed else 0
        return (latents,) if not kwargs.get("return_dict", True) else _Step(prev_sample=latents)

    # Start of a generation -------------------------------------------------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        """The original behind the pipeline's shadow."""
        return self.scheduling.scheduler

    @property
    def schedule(self) -> Schedule:
        """The table of this call; None until the loop begins."""
        return self.scheduling.schedule

    def compiled(self, timestep: Any) -> Schedule:
        """The table of this call, compiled at the first thing the loop asks for."""
        if self.schedule is None:
            self.scheduling.compile(self.scheduling.begin_at(timestep), self.guidance.own_step)
        return self.schedule

    def _start(self, latents: torch.Tensor) -> None:
        halves = 2 if self.guidance.on else 1
        plan = self.guidance.planned(latents, latents.shape[0])
        noise_dtype = self.schedule.noise_dtype or latents.dtype
        self.loop = self.graphed.lease(latents, self.schedule, plan, halves=halves, noise_dtype=noise_dtype)
        if self.loop is None:
            self.loop = Loop(self.schedule, plan, latents, halves=halves)

    # Within a step ---------------------------------------------------------------------------------------------------------

    def _ready_input(self, sample: torch.Tensor) -> torch.Tensor | None:
        """The model input that the last step wrote, if nothing can have changed the latents since."""
        if self.row == 0 or self.observed or not self.schedule.linear:
            return None
        ready = self.loop.model_input
        return ready if ready.shape == sample.shape else None

    def _unchanged(self, sample: torch.Tensor) -> bool:
        return sample is self._returned and (not self.observed or _version(sample) == self._returned_version)

    def _latents(self) -> torch.Tensor:
        """What the pipeline gets back from a step."""
        if self.observed or self.row == len(self.schedule.timesteps):
            return self.loop.latents(fresh=self.observed or self.graphed.loop is not None)
        if self._pending is None:
            x, loop = self.loop.x, self.loop
            self._pending = Pending(lambda: loop.latents(fresh=True), x.shape, x.stride(), loop.dtype, x.device)
        return self._pending

    def follow_guidance_scale(self) -> None:
        """A callback may change the guidance scale: the rows still to come take the new one, counters and history stay."""
        if self.guidance.changed():
            self.loop.load_plan(self.guidance.plan)

    def _draw_ahead(self, latents: torch.Tensor) -> None:
        """Unless somebody may use the generator between two steps, or fewer rows than the table's will run."""
        if (
            not self.observed
            and self.arguments.get("denoising_end") is None
            and self.scheduling.passes_generator(self.pipe)
        ):
            self.noise.draw_ahead(self.schedule, latents, self.arguments.get("generator"))

    @property
    def generator(self) -> Any:
        """What the pipeline will hand to scheduler.step to draw from."""
        return self.arguments.get("generator") if self.scheduling.passes_generator(self.pipe) else None

    # After it --------------------------------------------------------------------------------------------------------------

    def report(self) -> Report | None:
        """What happened, or None if the loop never ran. Reads nothing from the device yet."""
        if self.loop is None:
            return None
        path = "fused" if self.schedule.linear else "own step"
        if self.graphed.replayed:
            path += ", loop graph" if self.graphed.whole else ", step graph"
        return Report.read(
            state=self.loop.state,
            trace=self.loop.trace,
            plan=self.guidance.plan,
            latents=self.loop.x if self._stepped is None else self._stepped,
            rows_run=self.rows_run,
            steps=self.row,
            path=path,
            reason="; ".join(filter(None, (self.schedule.reason, self.graphed.reason))) or None,
        )

    def close(self) -> None:
        """The call is over and its report made."""
        self.noise.rewind(self.row)
        if self.graphed.whole and hasattr(self.pipe, "_num_timesteps"):
            self.pipe._num_timesteps = self.row
        self.graphed.give_back()


class _Step(dict):
    """What scheduler.step returns by default: `prev_sample` as attribute, key and first item."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"scheduler.step: {name!r} is not computed on the fused path; only prev_sample is"
            ) from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("prev_sample" if key == 0 else key)


def _version(tensor: torch.Tensor) -> float:
    try:
        return tensor._version
    except (
        RuntimeError
    ):  # inference tensors count no versions: NaN, unequal to itself, takes every tensor for a changed one
        return math.nan
