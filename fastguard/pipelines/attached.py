"""What both kinds of attaching share: the stand-in on which the stock loop runs, and where that loop begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastguard import checks
from fastguard.loop.guide import Guide
from fastguard.loop.report import Report
from fastguard.pipelines.scheduler import Scheduling
from fastguard.pipelines.shadow import shadow
from fastguard.policies.plan import of_images, unfit_guards
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy as make_policy
from fastguard.schedules.schedule import Schedule

UNGUIDED = ("raise", "run")  # what a guarded policy does in a call without a second branch
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class Attached:
    """One call of a pipeline, whose stock `__call__` runs on `stand_in`. A callback sees that, and may change guidance on it.

    guide    what guidance its images get; None until the loop begins
    reasons  what the report has to say
    """

    path: str  # of the report
    guide: Any  # Guide

    def __init__(
        self,
        policy: Policy,
        arguments: Mapping[str, Any],
        pipe: Any,
        denoisers: Mapping[str, Callable[..., Any]],
        *,
        unguided: str = "raise",
        callback: bool = False,
        scales_input: bool = False,
    ) -> None:
        """arguments: of the pipeline's call, by name; denoisers: what replaces the calls of its denoisers. callback, scales_input: as of
        `Scheduling`."""
        self.policy, self.arguments, self.pipe, self.unguided = policy, arguments, pipe, unguided
        self.guide = None
        self.reasons: list[str | None] = []
        self.scheduling = Scheduling(pipe.scheduler, arguments, callback=callback, scales_input=scales_input)
        self._latents: Any = None  # the first, as the pipeline prepares them
        of_scheduler = {"step": self.step, "set_timesteps": self.scheduling.set_timesteps}
        if scales_input:
            of_scheduler["scale_model_input"] = self.scale_model_input
        own = {"prepare_latents": self.prepare_latents, "progress_bar": self.progress_bar}
        # Offloading replaces the pipeline's hooks at the end of a call: they belong to the original.
        own["maybe_free_model_hooks"] = pipe.maybe_free_model_hooks
        parts = {name: shadow(getattr(pipe, name), {"__call__": call}) for name, call in denoisers.items()}
        # BriaPipeline calls it unless the scheduler's type is FlowMatchEulerDiscreteScheduler itself, which a shadow's never is.
        unscaled = {"scale_model_input": lambda sample, timestep=None: sample}
        has_it = hasattr(pipe.scheduler, "scale_model_input")
        parts["scheduler"] = shadow(pipe.scheduler, of_scheduler, {} if has_it else unscaled)
        self.stand_in = shadow(pipe, own, parts)

    # In the place of the pipeline's and the scheduler's methods ------------------------------------------------------------

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        result = self.pipe.prepare_latents(*args, **kwargs)
        self._latents = result[0] if isinstance(result, tuple) else result
        return result

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        """Made when everything is prepared: the loop begins here, before its first row, where its latents and that row are known."""
        told = self.scheduling.told_row
        known = told is not None or not hasattr(self.stand_in, "get_timesteps")
        empty = (told or 0) >= len(self.scheduling.scheduler.timesteps)
        if isinstance(self._latents, torch.Tensor) and known and not empty:
            self.begin(self._latents, told or 0)
        return self.pipe.progress_bar(*args, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def step(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    # The loop begins -------------------------------------------------------------------------------------------------------

    def begin(self, latents: torch.Tensor, row: int) -> None:
        """Bring what the rows need to the device. `latents` [B, ...] are the first, `row` is the schedule's."""
        schedule = self.scheduling.compile(row, self.own_step(), self.stand_in)
        per_prompt = next((self.arguments[name] for name in _PER_PROMPT if self.arguments.get(name)), 1)
        self.guide = self.guide_of(of_images(self.policy, len(latents), per_prompt), schedule, latents)
        for sentence in unfit_guards(self.guide.plan, self.scheduling.rows_of_the_loop()):
            checks.warn(sentence)

    def own_step(self) -> str | None:
        """Why the scheduler's own step() must run, whatever the table can do."""
        raise NotImplementedError

    def guide_of(self, policies: list[Policy], schedule: Schedule, latents: torch.Tensor) -> Guide:
        raise NotImplementedError

    # Calls without a second branch -----------------------------------------------------------------------------------------

    def refuse_unguided(self, given: str, remedy: str) -> bool:
        """The first row has one branch. ValueError if a guard needs two, for the conditional branch alone copies; True if that was replaced by
        plain guidance, at the user's word."""
        if not (self.policy.guarded or self.policy.sets_scale):
            return False
        if self.unguided == "raise":
            raise ValueError(
                f"{given}: the pipeline runs no second (unconditional) branch then, but policy {self.policy.name!r} needs it; {remedy}, use "
                f"'cfg' without a scale of its own, or enable the guard with unguided='run'"
            )
        self.policy = make_policy("cfg")
        self.reasons = [f"{given}: no second branch, so nothing was guarded (unguided='run')"]
        return True

    def warn_of_its_end(self) -> None:
        """A later row has one branch."""
        if self.policy.guarded:
            checks.warn(
                f"the second branch ended at denoiser row {self.guide.row}: the guard ends with it, and an image that has not reached "
                f"its transition gets the conditional branch alone, which copies",
            )

    # After it --------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The stock call has returned; whatever it returned is its own."""

    def report(self) -> Report | None:
        """What happened, or None if no row ran. Reads nothing from the device yet."""
        if self.guide is None or self.guide.row == 0:
            return None
        return self.guide.report(
            path=self.path, reason="; ".join(filter(None, self.reasons)) or None, latents=self.scheduling.stepped
        )

    def close(self) -> None:
        """The call is over and its report made."""


def check_shape(shown: list[int], begun: list[int]) -> None:
    """ValueError if the latents are not of the shape any more with which the loop began: what is known of an image lies in its place."""
    if shown != begun:
        raise ValueError(
            f"latents became {shown} in a guarded call that began with {begun} (a callback changed their size or dropped an image): the guard "
            f"keeps state per image and cannot follow; disable it for such a call"
        )
