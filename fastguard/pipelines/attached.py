"""What both kinds of attaching share: the stand-in on which the stock loop runs, and the moment just before its first row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastguard.loop.report import Report
from fastguard.pipelines.scheduler import Scheduling
from fastguard.pipelines.shadow import stand_in
from fastguard.policies.plan import of_images
from fastguard.policies.policy import Policy

_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class Attached:
    """One call of a pipeline, whose stock `__call__` runs on `stand_in`.

    scheduling  the scheduler of this call
    prepared    what the pipeline's prepare_latents gave; None before, and where it has no such method
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        denoisers: Mapping[str, Callable[..., Any]],
        *,
        callback: bool = False,
        scales_input: bool = False,
        steps: Mapping[str, Callable[..., Any]] | None = None,
        methods: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        """arguments: of the pipeline's call, by name; denoisers, steps, methods: what replaces the calls of its denoisers, and methods of
        its scheduler (besides step) and of its own. callback, scales_input: as of `Scheduling`."""
        self.arguments = arguments
        self.scheduling = Scheduling(pipe.scheduler, arguments, callback=callback, scales_input=scales_input)
        self.prepared: Any = None

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = pipe.prepare_latents(*args, **kwargs)
            self.prepared = result[0] if isinstance(result, tuple) else result
            return result

        def progress_bar(*args: Any, **kwargs: Any) -> Any:  # made when everything is prepared
            self.begin_early()
            return pipe.progress_bar(*args, **kwargs)

        own = {"prepare_latents": prepare_latents, "progress_bar": progress_bar}
        scheduler = {"step": self.step, "set_timesteps": self.scheduling.set_timesteps}
        self.stand_in = stand_in(pipe, {**scheduler, **(steps or {})}, denoisers, {**own, **(methods or {})})

    def begin_early(self) -> None:
        """The loop is about to start. Where its first latents or its first row are not known yet, the first row begins it."""
        begin = self.scheduling.begin_index
        late = hasattr(self.stand_in, "get_timesteps") and begin is None
        empty = (begin or 0) >= len(self.scheduling.scheduler.timesteps)
        if isinstance(self.prepared, torch.Tensor) and not (late or empty):
            self.begin(self.prepared, begin or 0)

    def begin(self, latents: torch.Tensor, row: int) -> None:
        """Bring what the rows need to the device. `latents` [B, ...] are the first, `row` is the schedule's."""
        raise NotImplementedError

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """In the place of the scheduler's."""
        raise NotImplementedError

    def report(self) -> Report | None:
        """What happened, or None if the loop never ran. Reads nothing from the device yet."""
        raise NotImplementedError

    def finish(self) -> None:
        """The stock call has returned; whatever it returned is its own."""

    def close(self) -> None:
        """The call is over and its report made."""


def policies_of(policy: Policy, arguments: Mapping[str, Any], batch: int) -> list[Policy]:
    """One per image. ValueError if a list is as long as neither the images nor the prompts."""
    return of_images(policy, batch, next((arguments[name] for name in _PER_PROMPT if arguments.get(name)), 1))


def no_second_branch(given: str, remedy: str, policy: Policy) -> ValueError:
    """A guard over a call without guidance would let copies through: the conditional branch alone copies."""
    return ValueError(
        f"{given}: the pipeline runs no second (unconditional branch) then, but policy {policy.name!r} needs it; {remedy}, use 'cfg' without "
        f"a scale of its own, or enable the guard with unguided='run'"
    )
