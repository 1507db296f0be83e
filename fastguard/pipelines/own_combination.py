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
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fastguard import checks
from fastguard.kernels.layout import Rule
from fastguard.loop.guide import Guide
from fastguard.loop.report import Report
from fastguard.pipelines.attached import Attached, no_second_branch, policies_of
from fastguard.pipelines.families.base import Family
from fastguard.pipelines.families.own import OwnFamily
from fastguard.pipelines.outputs import keeps_state
from fastguard.policies.plan import Plan, unfit_guards
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy as make_policy

REASON = "the pipeline combines the branches itself"
EAGER = "capture={!r} became 'off': the pipeline runs its denoiser itself"


class Output(NamedTuple):
    """A denoiser's call: who, with which arguments, what came out of it (None: it was left out)."""

    denoiser: str
    arguments: tuple[tuple, dict[str, Any]]
    tensor: Any


class OwnCombination(Attached):
    """`denoisers` are the originals behind the stand-in's shadows; `guide` is None until the loop begins."""

    def __init__(
        self,
        policy: Policy,
        family: OwnFamily,
        arguments: Mapping[str, Any],
        pipe: Any,
        *,
        unguided: str = "raise",
        capture: str = "auto",
        methods: Mapping[str, Any] | None = None,
    ) -> None:
        """methods: as of `Attached`; capture: as of `enable`, where nothing is recorded."""
        self.policy, self.family, self.unguided = policy, family, unguided
        self.denoisers = {name: part for name in family.denoisers if (part := getattr(pipe, name, None)) is not None}
        calls = {name: functools.partial(self.denoise, name) for name in self.denoisers}
        super().__init__(pipe, arguments, calls, methods=methods)
        self.row = 0
        self.guide: Guide | None = None
        self.reasons = [EAGER.format(capture)] if capture in ("step", "loop") else []  # for the report
        self._step_signature = inspect.signature(pipe.scheduler.step)
        self._outputs: list[Output] = []  # of this row
        # The last result of (denoiser, branch), shown where a call is left out.
        self._results: dict[tuple[str, str], Any] = {}
        self._skip_until = 0  # row from which on some image may need both branches
        self._both = True  # the row before had both branches

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
        if self.row < self._skip_until or self.guide is None:
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
        if self.row >= self._skip_until:
            self._results.clear()
        return self.scheduling.own_step(*bound.args, **bound.kwargs)

    # A row -----------------------------------------------------------------------------------------------------------------

    def _guided(self, combined: torch.Tensor, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        channels = sample.shape[1]  # a model may predict more (a variance), which still reaches step()
        own = combined[:, :channels] if combined.shape[1] > channels else combined
        uncond, cond = self._branches(own)
        if self.guide is None or self.guide.loop.x.shape != sample.shape:
            self.begin(sample, self.scheduling.begin_at(timestep))
        self._check(sample, uncond is not None and cond is not None)
        guide: Any = self.guide
        guide.follow(self._scale(self._outputs[0].denoiser))
        if uncond is not None and cond is not None:
            e = guide(uncond, cond, None if guide.loop.anchor is None else sample, combined=own)
        elif any(output.tensor is None for output in self._outputs):  # one branch left out
            only: Any = self._left_over(own) if uncond is None and cond is None else uncond if cond is None else cond
            e = guide(only, None).to(own.dtype)
        else:
            e = guide(own, None, combined=own)
        return e if own is combined else torch.cat([e, combined[:, channels:]], 1)

    def _scale(self, denoiser: str) -> float:
        return self.family.guidance_scale(self.stand_in, self.arguments, denoiser)

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

    def begin(self, latents: torch.Tensor, row: int) -> None:
        schedule = self.scheduling.compile(row, REASON, self.stand_in)
        policies = policies_of(self.policy, self.arguments, len(latents))
        guide = Guide(policies, schedule, guidance_scale=self._scale(next(iter(self.denoisers))), latents=latents)
        for sentence in unfit_guards(guide.plan, self.scheduling.rows_of_the_loop()):
            checks.warn(sentence)
        self.guide, self._skip_until = guide, self._skips_until(guide.plan)

    def _skips_until(self, plan: Plan) -> int:
        """The row from which on no call is left out: a later one may need what the call would have given."""
        if set(plan.branches) == {"both"} or any(policy.transition != "static" for policy in plan.policies):
            return 0
        if (forbids := self._forbids_skipping()) is not None:
            self.reasons.append(f"both branches run in every row: {forbids}")
            return 0
        return int(plan.rules[:, Rule.SWITCH_ROW].min())

    def _forbids_skipping(self) -> str | None:
        """Why a call whose branch no image needs is made all the same."""
        if self.family.calls == 1:
            return "they come of one call"
        if not self.family.skippable:
            return "the pipeline or its guider remembers them"
        if any(self.arguments.get(f"ip_adapter_image{end}") is not None for end in ("", "_embeds")):
            return "the pipeline swaps the IP-Adapter's embeddings between them"
        return next(filter(None, map(keeps_state, self.denoisers.values())), None)

    def _check(self, sample: torch.Tensor, both: bool) -> None:
        """Refuses a guard over a call without a second branch; warns if that ends before the guard does."""
        both = both or (len(self._outputs) == 2 and any(output.tensor is None for output in self._outputs))
        if not both and self.row == 0 and (self.policy.guarded or self.policy.sets_scale):
            given = self.family.given(self.stand_in, self.arguments)
            if self.unguided == "raise":
                raise no_second_branch(given, self.family.second_branch, self.policy)
            self.policy = make_policy("cfg")
            self.begin(sample, self.scheduling.first_row)
            self.reasons = [f"{given}: no second branch, so nothing was guarded (unguided='run')"]
        if not both and self._both and self.row > 0 and self.policy.guarded:
            checks.warn(
                f"the second branch ended at denoiser row {self.row}: the guard ends with it, and an image that has not reached "
                f"its transition gets the conditional branch alone, which copies",
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

    def report(self) -> Report | None:
        if self.guide is None or self.row == 0:
            return None
        return self.guide.report(
            path="own combination", reason="; ".join(self.reasons) or None, latents=self.scheduling.stepped
        )


def first_denoiser(pipe: Any, family: Family | OwnFamily) -> Any:
    """The pipeline's denoiser; the first that it has where a family knows several."""
    return next((part for name in family.denoisers if (part := getattr(pipe, name, None)) is not None), None)


def tensor_of(result: Any) -> Any:
    """The denoiser's output (a tensor, or a list of one per row) in what its call returned."""
    if isinstance(result, (tuple, dict)):  # diffusers' outputs are dicts whose first item is [0]
        return result[0]
    return getattr(result, "sample", result)
