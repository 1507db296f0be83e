"""What both kinds of attaching share: the stand-in on which the stock loop runs, and where that loop begins."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastguard import checks
from fastguard.loop.guide import Guide
from fastguard.loop.report import Report
from fastguard.pipelines.families import parts_of
from fastguard.pipelines.scheduler import Scheduling
from fastguard.pipelines.shadow import shadow
from fastguard.policies.plan import of_images, unfit_guards
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy as make_policy

UNGUIDED = ("raise", "run")  # what a guarded policy does in a call without a second branch
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class Attached:
    """One call of a pipeline, whose stock `__call__` runs on `stand_in`. A callback sees that, and may change guidance on it.

    denoisers  the originals behind the stand-in's shadows
    guide      what guidance its images get; None until the loop begins
    path       of the report; reasons: what it has to say

    Each kind of attaching has its own

    denoise    (name, arguments): in the place of the denoiser of that name
    step       in the place of the scheduler's
    begin      (latents, row): brings what the rows need to the device; latents [B, ...]: the first, row: of the schedule
    """

    path: str
    guide: Any  # Guide
    denoise: Callable[..., Any]
    step: Callable[..., Any]
    begin: Callable[[torch.Tensor, int], None]

    def __init__(
        self, policy: Policy, family: Any, arguments: Mapping[str, Any], pipe: Any, *, unguided: str = "raise"
    ) -> None:
        """arguments: of the pipeline's call, by name."""
        self.policy, self.arguments, self.pipe, self.unguided = policy, arguments, pipe, unguided
        self.family: Any = family
        self.guide = None
        self.reasons: list[str | None] = []
        self.scheduling = Scheduling(pipe.scheduler, arguments)
        self._latents: Any = None  # the first, as the pipeline prepares them
        self.denoisers = parts_of(pipe, family.denoisers)
        calls = {name: {"__call__": functools.partial(self.denoise, name)} for name in self.denoisers}
        parts = {name: shadow(part, calls[name]) for name, part in self.denoisers.items()}
        of_scheduler = {"step": self.step, "set_timesteps": self.scheduling.set_timesteps}
        parts["scheduler"] = shadow(pipe.scheduler, of_scheduler, {"scale_model_input": self.scale_model_input})
        own = {"prepare_latents": self.prepare_latents, "progress_bar": self.progress_bar}
        # Offloading replaces the pipeline's hooks at the end of a call: they belong to the original.
        own["maybe_free_model_hooks"] = pipe.maybe_free_model_hooks
        self.stand_in = shadow(pipe, own, parts)

    # In the place of the pipeline's and its parts' methods -----------------------------------------------------------------

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

    def scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The scheduler's own, if it has one: BriaPipeline calls it unless the scheduler's type is FlowMatchEulerDiscreteScheduler itself,
        which a shadow's never is."""
        own = getattr(self.scheduling.scheduler, "scale_model_input", None)
        return sample if own is None else own(sample, *args, **kwargs)

    # The loop begins -------------------------------------------------------------------------------------------------------

    def guide_by(self, make: Callable[..., Guide], latents: torch.Tensor, row: int, own_step: str | None) -> None:
        """`make` of policies, schedule and latents. own_step: why the scheduler's own step() must run, whatever the table can do."""
        schedule = self.scheduling.compile(row, own_step, self.stand_in)
        per_prompt = next((self.arguments[name] for name in _PER_PROMPT if self.arguments.get(name)), 1)
        self.guide = make(of_images(self.policy, len(latents), per_prompt), schedule, latents=latents)
        for sentence in unfit_guards(self.guide.plan, self.scheduling.rows_of_the_loop()):
            checks.warn(sentence)

    # Calls without a second branch -----------------------------------------------------------------------------------------

    def refuse_unguided(self) -> bool:
        """The first row has one branch. ValueError if a guard needs two, for the conditional branch alone copies; True if that was replaced by
        plain guidance, at the user's word."""
        if not (self.policy.guarded or self.policy.sets_scale):
            return False
        given = self.family.given(self.stand_in, self.arguments)
        if self.unguided == "raise":
            raise ValueError(
                f"{given}: the pipeline runs no second (unconditional) branch then, but policy {self.policy.name!r} needs it; "
                f"{self.family.second_branch}, use 'cfg' without a scale of its own, or enable the guard with unguided='run'"
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
        reason = "; ".join(filter(None, self.reasons)) or None
        return self.guide.report(path=self.path, reason=reason, latents=self.scheduling.stepped)

    def close(self) -> None:
        """The call is over and its report made."""


def check_shape(shown: list[int], begun: list[int]) -> None:
    """ValueError if the latents are not of the shape any more with which the loop began: what is known of an image lies in its place."""
    if shown != begun:
        raise ValueError(
            f"latents became {shown} in a guarded call that began with {begun} (a callback changed their size or dropped an image): the guard "
            f"keeps state per image and cannot follow; disable it for such a call"
        )
