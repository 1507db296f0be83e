"""One call of a pipeline that combines its branches itself: the second kind of attaching.

The stock loop runs with the denoiser's real outputs. u and c are collected as the denoiser gives them (halves of one batch in
either order, two calls, lists, two networks) and at `scheduler.step` the fused op decides on them, over a table without update:

    e = u + g (c - u)         for the images that the guard holds at this row
    e = combined              for all others: what the pipeline made of u and c itself, bit for bit, whatever its formula and dtype

The scheduler's own step() follows. Nothing is deferred and nothing is read from the device.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastguard.kernels.layout import Rule
from fastguard.loop.guide import Guide
from fastguard.loop.report import Report
from fastguard.pipelines.families.base import Family
from fastguard.pipelines.families.own import OwnFamily
from fastguard.pipelines.outputs import HARMLESS_HOOKS
from fastguard.pipelines.scheduler import Scheduling
from fastguard.pipelines.shadow import stand_in
from fastguard.policies.plan import of_images, unfit_guards
from fastguard.policies.policy import Policy

REASON = "the pipeline combines the branches itself"
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


class Output(NamedTuple):
    """A denoiser's call: who, with which arguments, what came out of it (None: it was left out)."""

    denoiser: str
    arguments: tuple[tuple, dict[str, Any]]
    tensor: Any


class OwnCombination:
    """State of one generation. `stand_in` is what the stock loop runs on; `denoisers` are the originals behind its shadows."""

    def __init__(
        self,
        policy: Policy,
        family: OwnFamily,
        arguments: Mapping[str, Any],
        pipe: Any,
        *,
        unguided: str = "raise",
    ) -> None:
        self.policy, self.family, self.arguments, self.unguided = policy, family, arguments, unguided
        scheduler = pipe.scheduler
        self.denoisers = {name: part for name in family.denoisers if (part := getattr(pipe, name, None)) is not None}
        self.scheduling = Scheduling(scheduler, arguments, callback=False, scales_input=False)
        self.stand_in = self._stand_in(pipe)
        self.row = 0
        self.guide: Guide | None = None  # None until the first step
        self._step_signature = inspect.signature(scheduler.step)
        self._outputs: list[Output] = []  # of this row
        self._results: dict[
            tuple[str, str], Any
        ] = {}  # the last result of (denoiser, branch), shown where a call is left out
        self._may_skip = (
            family.calls == 2
            and family.skippable
            and not any(map(_keeps_state, self.denoisers.values()))
            and all(arguments.get(f"ip_adapter_image{end}") is None for end in ("", "_embeds"))
        )
        self._skip_until = 0  # row from which on some image is not guarded
        self._both = True  # the row before had both branches
        self._last: torch.Tensor | None = None
        self._prepared: Any = None  # what the pipeline's prepare_latents gave

    def _stand_in(self, pipe: Any) -> Any:
        calls = {name: functools.partial(self.denoise, name) for name in self.denoisers}

        def progress_bar(*args: Any, **kwargs: Any) -> Any:  # made when everything is prepared
            self._begin_early()
            return pipe.progress_bar(*args, **kwargs)

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = pipe.prepare_latents(*args, **kwargs)
            self._prepared = result[0] if isinstance(result, tuple) else result
            return result

        steps = {"step": self.step, "set_timesteps": self.scheduling.set_timesteps}
        return stand_in(pipe, steps, calls, {"progress_bar": progress_bar, "prepare_latents": prepare_latents})

    # What the shadows call -------------------------------------------------------------------------------------------------

    def denoise(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a denoiser and keep its output, unless no image needs its branch in this row."""
        number = len(self._outputs)
        if number == self.family.calls:
            raise RuntimeError(
                f"{name} was called {number + 1} times without a scheduler.step in between, where the guard knows "
                f"{self.family.calls}: a third branch, or a step of another scheduler; call the pipeline without the guard"
            )
        branch = self.family.order[number] if self.family.calls == 2 else "both"
        if self._skips(name, branch):
            self._outputs.append(Output(name, (args, kwargs), None))
            return self._results[name, branch]
        result = self.denoisers[name](*args, **kwargs)
        self._outputs.append(Output(name, (args, kwargs), tensor_of(result)))
        if self._may_skip:
            self._results[name, branch] = result
        return result

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Decide, replace the pipeline's guided output where an image is guarded, and let the scheduler's own step() follow."""
        bound = self._step_signature.bind(*args, **kwargs)
        combined, sample = bound.arguments["model_output"], bound.arguments["sample"]
        if not self._outputs:
            raise RuntimeError("scheduler.step was called without a denoiser call before it")
        bound.arguments["model_output"] = self._guided(combined, sample, bound.arguments["timestep"])
        self._outputs.clear()
        self.row += 1
        result = self.scheduling.scheduler.step(*bound.args, **bound.kwargs)
        self._last = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    # A row -----------------------------------------------------------------------------------------------------------------

    def _guided(self, combined: torch.Tensor, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        channels = sample.shape[1]  # a model may predict more (a variance), which still reaches step()
        own = combined[:, :channels] if combined.shape[1] > channels else combined
        uncond, cond = self._branches(own)
        scale = self.family.guidance_scale(self.stand_in, self.arguments, self._outputs[0].denoiser)
        if self.guide is None or self.guide.loop.x.shape != sample.shape:
            self.guide = self._begin(sample, timestep, scale)
        self._check(uncond is not None and cond is not None)
        self.guide.follow(scale)
        if uncond is not None and cond is not None:
            x = None if self.guide.loop.anchor is None else sample
            e = self.guide(uncond, cond, x, combined=own)
        elif self._outputs[-1].tensor is None or self._outputs[0].tensor is None:  # one branch left out
            only: Any = self._left_over(own) if uncond is None and cond is None else uncond if cond is None else cond
            e = self.guide(only, None).to(own.dtype)
        else:
            e = self.guide(own, None, combined=own)
        return e if own is combined else torch.cat([e, combined[:, channels:]], 1)

    def _branches(self, own: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(u, c) of this row in the step's space, None for a branch that did not run."""
        found: dict[str, torch.Tensor | None] = {"uncond": None, "cond": None}
        if self.family.calls == 1:
            tensor = self._in_step(self._outputs[0], own)
            if len(tensor) == 2 * len(own):
                found |= dict(zip(self.family.order, tensor.chunk(2), strict=True))
            elif len(tensor) == len(own):
                found["cond"] = tensor
            else:
                raise RuntimeError(
                    f"{self._outputs[0].denoiser} gave {len(tensor)} rows for {len(own)} images: the guard knows one or two each"
                )
        else:
            branches = self.family.order if len(self._outputs) == 2 else ("cond",)
            found |= {
                branch: None if output.tensor is None else self._in_step(output, own)
                for branch, output in zip(branches, self._outputs, strict=True)
            }
        for branch, given in found.items():
            if given is not None and given.shape != own.shape:
                raise RuntimeError(
                    f"{type(self.stand_in).__name__}: the {branch} output is {list(given.shape)} where scheduler.step gets "
                    f"{list(own.shape)}; this is not the loop that the guard knows, call the pipeline without it"
                )
        return found["uncond"], found["cond"]

    def _in_step(self, output: Output, own: torch.Tensor) -> torch.Tensor:
        _, kwargs = output.arguments
        tensor = torch.stack(list(output.tensor)) if isinstance(output.tensor, (list, tuple)) else output.tensor
        return self.family.in_step(self.stand_in, tensor, own, kwargs)

    def _left_over(self, own: torch.Tensor) -> torch.Tensor:
        """The row turned out to have one branch (guidance ended), and its call was left out: run it now."""
        output = self._outputs[0]
        args, kwargs = output.arguments
        return self._in_step(output._replace(tensor=tensor_of(self.denoisers[output.denoiser](*args, **kwargs))), own)

    def _skips(self, name: str, branch: str) -> bool:
        if self.row >= self._skip_until or (name, branch) not in self._results:
            return False
        assert self.guide is not None
        return self.guide.plan.branches[self.row] not in ("both", branch)

    def _begin_early(self) -> None:
        """The loop is about to start: bring the tables to the device before it, where latents and first row are known already."""
        begin = self.scheduling.begin_index
        late = hasattr(self.stand_in, "get_timesteps") and begin is None
        timesteps = self.scheduling.scheduler.timesteps
        if isinstance(self._prepared, torch.Tensor) and not late and (begin or 0) < len(timesteps):
            scale = self.family.guidance_scale(self.stand_in, self.arguments, next(iter(self.denoisers)))
            self.guide = self._begin(self._prepared, timesteps[begin or 0], scale)

    def _begin(self, sample: torch.Tensor, timestep: Any, scale: float) -> Guide:
        schedule = self.scheduling.compile(self.scheduling.begin_at(timestep), REASON, self.stand_in)
        per_prompt = next((self.arguments[name] for name in _PER_PROMPT if self.arguments.get(name)), 1)
        policies = of_images(self.policy, len(sample), per_prompt)
        guide = Guide(policies, schedule, guidance_scale=scale, latents=sample)
        if self._may_skip and all(policy.transition == "static" for policy in policies):
            self._skip_until = int(guide.plan.rules[:, Rule.SWITCH_ROW].min())
        for sentence in unfit_guards(guide.plan, self.scheduling.rows_of_the_loop()):
            warnings.warn(sentence, stacklevel=2)
        return guide

    def _check(self, both: bool) -> None:
        """Refuses a guard over a call without a second branch; warns if that ends before the guard does."""
        skipped = any(output.tensor is None for output in self._outputs)
        both = both or (skipped and len(self._outputs) == 2)
        needs = self.unguided == "raise" and (self.policy.guarded or self.policy.sets_scale)
        if not both and self.row == 0 and needs:
            given = self.family.given(self.stand_in, self.arguments)
            raise ValueError(
                f"{given}: the pipeline runs no second (unconditional) branch then, but policy {self.policy.name!r} needs it; "
                f"{self.family.second_branch}, use 'cfg' without a scale of its own, or enable the guard with "
                f"unguided='run'"
            )
        if not both and self._both and self.row > 0 and self.policy.guarded:
            warnings.warn(
                f"the second branch ended at denoiser row {self.row}: the guard ends with it, and an image that has not reached "
                f"its transition gets the conditional branch alone, which copies",
                stacklevel=2,
            )
        self._both = both

    # After it --------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The stock call has returned. RuntimeError if a denoiser's output never reached the scheduler's step."""
        if self._outputs:
            raise RuntimeError(
                f"{self._outputs[0].denoiser} ran and no scheduler.step of this pipeline's scheduler followed: the guard did not act; "
                f"call the pipeline without it"
            )

    def close(self) -> None:
        """The call is over and its report made; nothing was lent."""

    def report(self) -> Report | None:
        """What happened, or None if the loop never ran. Reads nothing from the device yet."""
        if self.guide is None or self.row == 0:
            return None
        return self.guide.report(path="own combination", latents=self._last)


def first_denoiser(pipe: Any, family: Family | OwnFamily) -> Any:
    """The pipeline's denoiser; the first that it has where a family knows several."""
    return next((part for name in family.denoisers if (part := getattr(pipe, name, None)) is not None), None)


def tensor_of(result: Any) -> Any:
    """The denoiser's output (a tensor, or a list of one per row) in what its call returned."""
    if isinstance(result, (tuple, dict)):  # diffusers' outputs are dicts whose first item is [0]
        return result[0]
    return getattr(result, "sample", result)


def _keeps_state(denoiser: Any) -> bool:
    """Whether a cache hangs on the denoiser, which keeps a state for each branch."""
    registries = (getattr(module, "_diffusers_hook", None) for module in denoiser.modules())
    return getattr(denoiser, "is_cache_enabled", False) or any(
        set(registry.hooks) - HARMLESS_HOOKS for registry in registries if registry is not None
    )
