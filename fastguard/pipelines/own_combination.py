"""One call of a pipeline that combines its branches itself: the second kind of attaching.

The stock loop runs with the denoiser's real outputs. u and c are collected as the denoiser gives them (halves of one batch in
either order, two calls, lists, two networks) and at `scheduler.step` the fused op decides on them, over a table without update:

    e = u + g (c - u)         for the images that the guard holds at this row
    e = combined              for all others: what the pipeline made of u and c itself, bit for bit, whatever its formula and dtype

The scheduler's own step() follows. Nothing is deferred and nothing is read from the device.
"""

import functools
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastguard.kernels.layout import NEVER, Rule
from fastguard.loop.guide import Guide
from fastguard.pipelines.attached import Attached, check_shape
from fastguard.pipelines.families import Family
from fastguard.pipelines.outputs import keeps_state
from fastguard.policies.policy import Policy


class Collected(NamedTuple):
    """A denoiser's call: who, with which arguments, what it returned (None: it was left out)."""

    denoiser: str
    args: tuple
    kwargs: dict[str, Any]
    result: Any


class OwnCombination(Attached):
    path = "own combination"

    def __init__(
        self, policy: Policy, family: Family, arguments: Mapping[str, Any], pipe: Any, *, unguided: str = "raise"
    ) -> None:
        super().__init__(policy, family, arguments, pipe, unguided=unguided)
        self._in_loop = not family.before_loop
        self._step_signature = inspect.signature(pipe.scheduler.step)
        self._outputs: list[Collected] = []  # of this row
        # The last result of (denoiser, branch), shown where a call is left out.
        self._results: dict[tuple[str, str], Any] = {}
        self._skip_until = NEVER  # row from which on some image may need both branches
        self._both = True  # the row before had both branches

    # In the place of the pipeline's parts ----------------------------------------------------------------------------------

    def denoise(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a denoiser and keep its output, unless no image needs its branch in this row."""
        if not self._in_loop:
            return self.denoisers[name](*args, **kwargs)
        number, row = len(self._outputs), 0 if self.guide is None else self.guide.row
        if number == self.family.calls:
            raise RuntimeError(
                f"{name} was called {number + 1} times without a scheduler.step in between, where the guard knows "
                f"{self.family.calls}: a third branch, or a step of another scheduler; call the pipeline without the guard"
            )
        branch = self.family.order[number] if self.family.calls == 2 else "both"
        skips = row < self._skip_until
        if skips and (name, branch) in self._results and self.guide.plan.branches[row] not in ("both", branch):
            self._outputs.append(Collected(name, args, kwargs, None))
            return self._results[name, branch]
        result = self.denoisers[name](*args, **kwargs)
        self._outputs.append(Collected(name, args, kwargs, result))
        if skips:
            self._results[name, branch] = result
        return result

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Decide, replace the pipeline's guided output where an image is guarded, and let the scheduler's own step() follow."""
        bound = self._step_signature.bind(*args, **kwargs)
        if not self._outputs:
            raise RuntimeError("scheduler.step was called without a denoiser call before it")
        given = bound.arguments
        given["model_output"] = self._guided(given["model_output"], given["sample"], given["timestep"])
        self._outputs.clear()
        if self._results and self.guide.row >= self._skip_until:
            self._results.clear()
        return self.scheduling.own_step(*bound.args, **bound.kwargs)

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        self._in_loop = True
        return super().progress_bar(*args, **kwargs)

    # The loop begins -------------------------------------------------------------------------------------------------------

    def begin(self, latents: torch.Tensor, row: int) -> None:
        scale = self.family.guidance_scale(self.stand_in, self.arguments, next(iter(self.denoisers)))
        make = functools.partial(Guide, guidance_scale=scale)
        self.guide_by(make, latents, row, "the pipeline combines the branches itself")
        self._skip_until = self._skips_until()

    def _skips_until(self) -> int:
        """The row from which on no call is left out: a later one may need what the call would have given."""
        plan = self.guide.plan
        if set(plan.branches) == {"both"} or any(policy.transition != "static" for policy in plan.policies):
            return 0
        if self.family.calls == 1:
            forbids: str | None = "they come of one call"
        elif not self.family.skippable:
            forbids = "the pipeline or its guider remembers them"
        elif any(self.arguments.get(f"ip_adapter_image{end}") is not None for end in ("", "_embeds")):
            forbids = "the pipeline swaps the IP-Adapter's embeddings between them"
        else:
            forbids = next(filter(None, map(keeps_state, self.denoisers.values())), None)
        if forbids is None:
            return int(plan.rules[:, Rule.SWITCH_ROW].min())
        self.reasons.append(f"both branches run in every row: {forbids}")
        return 0

    # A row -----------------------------------------------------------------------------------------------------------------

    def _guided(self, output: torch.Tensor, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        channels = sample.shape[1]  # a model may predict more (a variance), which still reaches step()
        combined = output[:, :channels] if output.shape[1] > channels else output
        uncond, cond = self._branches(combined)
        if self.guide is None or (self.guide.row == 0 and self.guide.loop.x.shape != sample.shape):
            self.begin(sample, self.scheduling.row_of(timestep))
        if sample.shape != self.guide.loop.x.shape:
            check_shape(list(sample.shape), list(self.guide.loop.x.shape))
        left_out = self._outputs[0].result is None or self._outputs[-1].result is None
        both = (uncond is not None and cond is not None) or (left_out and len(self._outputs) == 2)
        if self._both and not both:
            if self.guide.row > 0:
                self.warn_of_its_end()
            elif self.refuse_unguided():
                self.begin(sample, self.scheduling.first_row)
        self._both = both
        guide = self.guide
        guide.follow(self.family.guidance_scale(self.stand_in, self.arguments, self._outputs[0].denoiser))
        if uncond is not None and cond is not None:
            e = guide(uncond, cond, None if guide.loop.anchor is None else sample, combined=combined)
        elif left_out:
            only: Any = cond if uncond is None else uncond
            if only is None:  # guidance ended, and the call of the branch that is left was left out: run it now
                name, args, kwargs, _ = self._outputs[0]
                only = self.family.in_step(self.stand_in, self.denoisers[name](*args, **kwargs), combined, kwargs)
            e = guide(only, None).to(output.dtype)
        else:
            e = guide(combined, None, combined=combined)
        return e if combined is output else torch.cat([e, output[:, channels:]], 1)

    def _branches(self, combined: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(u, c) of this row in the step's space, None for a branch that did not run."""
        tensors: list[Any] = [
            None if result is None else self.family.in_step(self.stand_in, result, combined, kwargs)
            for _, _, kwargs, result in self._outputs
        ]
        names: tuple[str, ...] = self.family.order
        if self.family.calls == 1:
            rows = len(tensors[0])
            if rows not in (len(combined), 2 * len(combined)):
                raise RuntimeError(
                    f"{self._outputs[0].denoiser} gave {rows} rows for {len(combined)} images: the guard knows one or two each"
                )
            tensors = list(tensors[0].chunk(rows // len(combined)))
        if len(tensors) == 1:
            names = ("cond",)
        found = dict(zip(names, tensors, strict=True))
        for branch, given in found.items():
            if given is not None and given.shape != combined.shape:
                raise RuntimeError(
                    f"{type(self.stand_in).__name__}: the {branch} output is {list(given.shape)} where scheduler.step gets "
                    f"{list(combined.shape)}; this is not the loop that the guard knows, call the pipeline without it"
                )
        return found.get("uncond"), found.get("cond")

    # After it --------------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """The stock call has returned. RuntimeError if a denoiser's output never reached the scheduler's step."""
        if self._outputs:
            raise RuntimeError(
                f"{self._outputs[0].denoiser} ran and no scheduler.step of this pipeline's scheduler followed: the guard did not act; "
                f"call the pipeline without it"
            )
