"""What a model allows a request to be, from its configuration alone: asked before any work."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from fastguard.batch.prompt_files import Problem
from fastguard.batch.request import Request
from fastguard.files import short
from fastguard.pipelines.enabled import stock_class
from fastguard.pipelines.families import find
from fastguard.pipelines.loading import distilled
from fastguard.policies.plan import limit_problem
from fastguard.schedules.schedule import in_training_steps


def check_class(kind: type) -> None:
    """TypeError if the guard does not know the pipeline class, ValueError if it makes no images from text alone."""
    find(kind)
    parameters = inspect.signature(kind.__call__).parameters  # type: ignore[operator]
    if "prompt" not in parameters or "image" in parameters:
        raise ValueError(f"generate needs a text-to-image pipeline, {kind.__name__} is none")


def check_pipeline(pipe: Any) -> None:
    """`check_class` of a pipeline or its skeleton; ValueError if its denoiser cannot be guarded, too."""
    check_class(stock_class(type(pipe)))
    if (reason := distilled(pipe)) is not None:
        raise ValueError(f"model: {reason}")


def misfits(pipe: Any, requests: Iterable[Request]) -> Iterator[Problem]:
    """One for each request that a pipeline, of which a skeleton is enough, cannot make."""
    scheduler = copy.deepcopy(pipe.scheduler)
    rows = lru_cache(maxsize=None)(lambda steps: _rows(scheduler, steps))
    multiple = math.lcm(8, int(getattr(pipe, "vae_scale_factor", 8)) * int(getattr(pipe, "patch_size", 1) or 1))
    in_steps = in_training_steps(scheduler)
    for request in requests:
        count, scale = rows(request.steps), request.policy.guidance_scale
        told = None if in_steps else limit_problem(request.policy)
        if isinstance(count, str):
            told = f"steps={request.steps}: {count}"
        elif isinstance(scale, tuple) and len(scale) != count:
            told = (
                f"policy {short(request.policy.name)}: guidance_scale has {len(scale)} values, must have one per denoiser row:"
                f" {count} at steps={request.steps}"
            )
        for name in ("width", "height"):
            if (getattr(request, name) or 0) % multiple:
                told = f"{name}={getattr(request, name)}: must be a multiple of {multiple}"
        if told is not None:
            yield Problem.of(request, told)


def _rows(scheduler: Any, steps: int) -> int | str:
    """Denoiser evaluations of that many steps, or why the scheduler cannot make them."""
    most = scheduler.config.get("num_train_timesteps")
    if most is not None and steps > most:
        return f"must be at most {most}, the timesteps that the model was trained with"
    shift = {"mu": scheduler.config.get("max_shift", 1.0)} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        scheduler.set_timesteps(steps, **shift)
    except Exception as error:
        return f"{type(scheduler).__name__} refuses: {error}"
    return len(scheduler.timesteps)
