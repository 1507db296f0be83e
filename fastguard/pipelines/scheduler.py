"""The scheduler of one call: the table of the rows that its loop will run, and what the stock loop expects of a scheduler besides."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from fastguard.schedules.compiler import compile_schedule
from fastguard.schedules.schedule import Schedule
from fastguard.schedules.scheduler_state import changed, signature


class Scheduling:
    """`scheduler` is the original behind the pipeline's shadow; `schedule` is None until `compile`.

    first_row: of the schedule, at which the loop begins. stepped: the latents that the last step gave.
    callback: somebody may change latents and scheduler between two steps.
    """

    def __init__(self, scheduler: Any, arguments: Mapping[str, Any]) -> None:
        self.scheduler, self.arguments = scheduler, arguments
        self.callback = any(arguments.get(name) is not None for name in ("callback_on_step_end", "callback"))
        self.schedule: Any = None  # Schedule
        self.stepped: torch.Tensor | None = None
        self.first_row = 0
        self.promised: dict[str, Any] = {}  # what the pipeline will hand to step() besides
        self._timesteps_arguments: tuple[tuple, dict] = ((), {})

    def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments: the table is compiled from the same call made on the host, without reading the device back."""
        self._timesteps_arguments = (args, kwargs)
        return self.scheduler.set_timesteps(*args, **kwargs)

    def own_step(self, *args: Any, **kwargs: Any) -> Any:
        result = self.scheduler.step(*args, **kwargs)
        self.stepped = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    @property
    def told_row(self) -> int | None:
        """Row at which the loop begins, where `set_begin_index` has said so already."""
        row = getattr(self.scheduler, "_begin_index", None)
        return None if row is None else int(row)

    def compile(self, row: int, own_step: str | None, pipe: Any) -> Schedule:
        """The table from `row` on. `own_step`: why the scheduler's own step() must run, whatever the table can do."""
        self.first_row = row
        if hasattr(pipe, "prepare_extra_step_kwargs"):  # asked in the way in which the pipeline asks itself
            asked = self.arguments.get("generator"), self.arguments.get("eta", 0.0)
            self.promised = pipe.prepare_extra_step_kwargs(*asked)
        schedule = compile_schedule(self._on_host(), step_kwargs=_relevant(self.promised), begin_index=row)
        if own_step is None and self.callback and schedule.looks_back:
            name = type(self.scheduler).__name__
            own_step = f"{name} goes back to latents of an earlier row, which the callback may have changed since"
        self.schedule = schedule if own_step is None else schedule.with_own_step(own_step)
        self._signature = signature(self.scheduler) if self.callback else {}
        return self.schedule

    def row_of(self, timestep: Any) -> int:
        """Row of the schedule at which a loop with this first timestep begins (image-to-image and denoising_start begin late).

        The loop's timesteps are views of `scheduler.timesteps`, so their offset tells without reading the device.
        """
        if self.told_row is not None:
            return self.told_row
        timesteps = self.scheduler.timesteps
        tensors = isinstance(timestep, torch.Tensor) and isinstance(timesteps, torch.Tensor)
        if tensors and torch._C._is_alias_of(timestep, timesteps):  # type: ignore[attr-defined]
            return (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)
        matches = [i for i, t in enumerate(timesteps) if float(t) == float(torch.as_tensor(timestep).flatten()[0])]
        if not matches:
            raise ValueError(f"timestep={timestep!r}: must be one of scheduler.timesteps")
        return matches[0]

    def check_arguments(self, step_kwargs: Mapping[str, Any]) -> None:
        """RuntimeError if the pipeline calls step() with other arguments than the table was made for."""
        if (given := _relevant(step_kwargs)) != (promised := _relevant(self.promised)):
            raise RuntimeError(
                f"scheduler.step got {given}, but the pipeline's prepare_extra_step_kwargs had promised {promised}, for which "
                f"the table of this call was made"
            )

    def check_unchanged(self) -> None:
        """RuntimeError if a callback has changed the scheduler, whose table was made before the first row."""
        now = signature(self.scheduler)
        if self.schedule.linear and (names := changed(self._signature, now)):
            raise RuntimeError(
                f"pipe.scheduler.{names[0]} was changed during a guarded call (by a callback), whose schedule was read before its first "
                f"step; change it before the call, or call the pipeline without the guard"
            )
        self._signature = now

    def _on_host(self) -> Any:
        """The scheduler with its timesteps in host memory: itself, or a copy on which set_timesteps is repeated."""
        if not isinstance(self.scheduler.timesteps, torch.Tensor) or self.scheduler.timesteps.device.type == "cpu":
            return self.scheduler
        host = copy.copy(self.scheduler)
        args, kwargs = self._timesteps_arguments
        names = list(inspect.signature(host.set_timesteps).parameters)
        bound = {**dict(zip(names, args, strict=False)), **kwargs, "device": "cpu"}
        host.set_timesteps(**bound)
        return host

    def rows_of_the_loop(self) -> int:
        """Rows of the table that the loop runs: with denoising_end, the share of the training steps to denoise, only the first ones."""
        end = self.arguments.get("denoising_end")
        if not isinstance(end, float) or not 0 < end < 1:
            return len(self.schedule.timesteps)
        steps = self.scheduler.config.num_train_timesteps
        return sum(float(t) >= round(steps - end * steps) for t in self.schedule.timesteps)


def _relevant(step_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a table depends on; it draws no noise."""
    return {name: value for name, value in step_kwargs.items() if name not in ("generator", "return_dict")}


def expected_arguments(scheduler: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline that is called with `arguments` hands to step(), as far as a table depends on it."""
    accepted = inspect.signature(scheduler.step).parameters
    return {"eta": arguments["eta"]} if "eta" in accepted and "eta" in arguments else {}


class Step(SchedulerOutput):
    """What scheduler.step returns by default, with `prev_sample` alone."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"scheduler.step: {name!r} is not computed on the fused path; only prev_sample is")
