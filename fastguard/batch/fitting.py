"""What a model allows a request to be, from its configuration alone: asked before any work."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastguard.batch.request import Request
from fastguard.batch.tables import Problem
from fastguard.files import short
from fastguard.pipelines.enabled import stock_class
from fastguard.pipelines.families import find
from fastguard.pipelines.loading import distilled, model_index, pipeline_class, skeleton
from fastguard.policies.plan import limit_problem
from fastguard.schedules.schedule import in_training_steps

UNSUPPORTED = "generate needs a text-to-image pipeline"


@dataclass(frozen=True)
class Limits:
    """multiple: of width and height, in pixels. scheduler: a copy, whose step counts are tried out."""

    multiple: int
    scheduler: Any

    @classmethod
    def of_pipeline(cls, pipe: Any) -> Limits:
        """ValueError if it makes no images from text alone."""
        check_class(stock_class(type(pipe)))
        if (reason := distilled(pipe)) is not None:
            raise ValueError(f"model: {reason}")
        factor = int(getattr(pipe, "vae_scale_factor", 8))
        patch = int(getattr(pipe, "patch_size", 1) or 1)
        return cls(math.lcm(8, factor * patch), copy.deepcopy(pipe.scheduler))

    @classmethod
    def of_model(cls, model: str, scheduler: str | None = None) -> Limits:
        """Of a model by name; no weights are loaded. ValueError if there is none, or it makes no images from text alone."""
        try:
            check_class(pipeline_class(model_index(model)))
        except TypeError as error:
            raise ValueError(f"model={model!r}: {error}") from None
        return cls.of_pipeline(skeleton(model, scheduler=scheduler))

    def check(self, requests: Iterable[Request]) -> None:
        """ValueError for the first that the model cannot make."""
        for problem in self.problems(requests):
            raise ValueError(problem.message)

    def problems(self, requests: Iterable[Request]) -> list[Problem]:
        """One for each request that the model cannot make."""
        found, rows = [], {}
        for request in requests:
            if request.steps not in rows:
                rows[request.steps] = self._rows(request.steps)
            if message := self._problem(request, rows[request.steps]):
                found.append(Problem.of(request, message))
        return found

    def _rows(self, steps: int) -> int | str:
        """Denoiser evaluations of that many steps, or why the scheduler cannot make them."""
        most = self.scheduler.config.get("num_train_timesteps")
        if most is not None and steps > most:
            return f"must be at most {most}, the timesteps that the model was trained with"
        options: Mapping[str, Any] = {}
        if self.scheduler.config.get("use_dynamic_shifting"):
            options = {"mu": self.scheduler.config.get("max_shift", 1.0)}
        try:
            self.scheduler.set_timesteps(steps, **options)
        except Exception as error:
            return f"{type(self.scheduler).__name__} refuses: {error}"
        return len(self.scheduler.timesteps)

    def _problem(self, request: Request, rows: int | str) -> str | None:
        if isinstance(rows, str):
            return f"steps={request.steps}: {rows}"
        for name in ("width", "height"):
            value = getattr(request, name)
            if value is not None and value % self.multiple:
                return f"{name}={value}: must be a multiple of {self.multiple}"
        if not in_training_steps(self.scheduler) and (problem := limit_problem(request.policy)) is not None:
            return problem
        scale = request.policy.guidance_scale
        if isinstance(scale, tuple) and len(scale) != rows:
            return (
                f"policy {short(request.policy.name)}: guidance_scale has {len(scale)} values, must have one per denoiser row:"
                f" {rows} at steps={request.steps}"
            )
        return None


def check_class(kind: type) -> None:
    """TypeError if the guard does not know the pipeline class, ValueError if it makes no images from text alone."""
    find(kind)
    parameters = inspect.signature(kind.__call__).parameters  # type: ignore[operator]
    if "prompt" not in parameters or "image" in parameters:
        raise ValueError(f"{UNSUPPORTED}, {kind.__name__} is none")
