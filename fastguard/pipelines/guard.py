"""Attach the guard to one pipeline object, and take it off again."""

from __future__ import annotations

import html
import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from fastguard import checks
from fastguard.capture.graphs import Graphs
from fastguard.capture.options import Options
from fastguard.loop.report import Report
from fastguard.pipelines.attached import UNGUIDED
from fastguard.pipelines.call import Call
from fastguard.pipelines.enabled import ATTRIBUTE, enabled_class, guard_of, stock_class
from fastguard.pipelines.families import Family, Fused, find, parts_of
from fastguard.pipelines.families.loops import changed
from fastguard.pipelines.loading import facts
from fastguard.pipelines.locks import held
from fastguard.pipelines.own_combination import OwnCombination
from fastguard.pipelines.probe import UNKNOWN, Probe, by_name, probe, unlisted
from fastguard.policies.policy import Policy
from fastguard.policies.presets import DEFAULT
from fastguard.policies.presets import policy as make_policy
from fastguard.policies.provenance import elsewhere

logger = logging.getLogger("fastguard")


def enable(
    pipe: Any,
    policy: str | Policy | Sequence[str | Policy] = DEFAULT,
    *,
    unguided: str = "raise",
    capture: str = "auto",
    attention_backend: str | None = None,
    compile: bool | Mapping[str, Any] = False,
    family: str | None = None,
    verify: bool = False,
    **overrides: Any,
) -> Guard:
    """Guard `pipe` in place: the same calls, the same outputs, under `policy`. Also a context manager.

    pipe       a diffusers pipeline on the allow-list (`fastguard.pipelines.families`)
    policy     a preset's name, a policy, a path to a policy file, or a list of them: one per image (or per prompt) of every call
    unguided   what a guarded policy does in a call without a second branch (guidance_scale <= 1), whose images may be copies: "raise",
               or "run" the call unguarded and say so in the report
    capture    CUDA graphs: "off", "step" (each row is one launch), "loop" (Stable Diffusion and SDXL text-to-image: the generation
               is one launch; else as "step"), "auto" ("step" on CUDA for small batches and latents, see docs/capture.md, else
               "off"). What cannot be recorded runs eagerly, and the report says why
    attention_backend  who computes the denoiser's attention: one of diffusers' names ("native", "xformers", "flash", ...); None:
               whatever the model does
    compile    torch.compile the denoiser for the guard's calls: True, or a dictionary of its arguments
    family     "probe": take a pipeline class that is not on the list; its first call is probed, and refused (TypeError) unless it
               combines u + g (c - u) of two branches with one g above 1 in every row (`fastguard.pipelines.probe`)
    verify     probe the first call of a listed class, too: RuntimeError if its loop does otherwise than the guard expects
    overrides  fields of the policy to replace, e.g. gate=0.02

    Enabling a guarded pipeline again replaces policy and options; `with enable(...)` gives back what it replaced. A policy whose gate was
    calibrated with another model, scheduler or dtype, or with other steps than the first call has, is told of once. FASTGUARD_DISABLE=1 in
    the environment makes every call a stock call. TypeError for a pipeline that is not supported, ValueError for a bad policy or an option
    that cannot work here.
    """
    base = stock_class(type(pipe))
    if family not in (None, "probe"):
        raise ValueError(f"family={family!r}: must be 'probe', or None for a pipeline class on the list")
    try:
        known = find(base)
    except TypeError:
        if family is None:
            raise
        known = unlisted(pipe)
    chosen = make_policy(policy, **overrides)
    checks.choice("unguided", unguided, UNGUIDED)
    if not isinstance(known, Fused) and (attention_backend is not None or compile):
        raise ValueError(
            f"attention_backend={attention_backend!r}, compile={compile!r}: {base.__name__} runs its denoiser itself; set them there "
            f"(pipe.{known.denoisers[0]}.set_attention_backend(...), .compile())"
        )
    denoiser = next(iter(parts_of(pipe, known.denoisers).values()), None)
    options = Options.of(denoiser, capture=capture, attention_backend=attention_backend, compile=compile)
    guard = Guard.of(pipe)
    known_policy = guard is not None and guard.policy == chosen
    if not known_policy and (ungated := chosen.ungated_warning()):
        logger.warning(ungated)
    if guard is None:
        guard = pipe.__dict__[ATTRIBUTE] = Guard(pipe, known, chosen, options)
        if (other_loop := changed(base)) is not None:
            logger.warning(other_loop)
        pipe.__class__ = enabled_class(base)
    else:
        guard._replaced = guard.policy, guard.options, guard.unguided
        guard.policy = chosen
        guard.options = options  # graphs are kept: their keys hold the options
    if not known_policy and chosen.provenance:
        guard.steps_checked = False
        for note in elsewhere(chosen, facts(pipe)):
            logger.warning(note)
    guard.unguided = unguided
    guard.probed = not verify and known.name != UNKNOWN
    return guard


class Guard:
    """The guard of one pipeline: its policy, the report of the last call, and the way back."""

    def __init__(self, pipe: Any, family: Family, policy: Policy, options: Options) -> None:
        self.policy = policy
        self.family = family
        self.options = options
        self.unguided = "raise"
        self.graphs = Graphs()
        self.in_a_call = False
        self.probed = True  # `enable` sets False where the next call is to be probed first
        self.steps_checked = False  # whether a call was compared with the steps that the policy belongs to
        self._pipe = pipe
        self._stock: Any = stock_class(type(pipe))
        self._signature = inspect.signature(self._stock.__call__)
        self._replaced: tuple[Policy, Options, str] | None = None  # by the last `enable`
        # What each `with` goes back to; None: the stock pipeline.
        self._outer: list[tuple[Policy, Options, str] | None] = []
        self._last: Report | None = None
        self._thread = threading.local()

    of = staticmethod(guard_of)

    @property
    def report(self) -> Report | None:
        """What happened, per image, in the last call made by this thread (or, if it made none, by any)."""
        return getattr(self._thread, "last", None) or self._last

    def __repr__(self) -> str:
        attached = "" if Guard.of(self._pipe) is self else ", disabled"
        settings = f"policy {self.policy.name!r}, capture={self.options.capture!r}, unguided={self.unguided!r}"
        return f"Guard of a {self._stock.__name__} ({self.family.name}){attached}: {settings}"

    def _repr_html_(self) -> str:
        report = self.report
        return f"<p>{html.escape(repr(self))}</p>" + ("" if report is None else report._repr_html_())

    def probe(self, *args: Any, **kwargs: Any) -> Probe:
        """What the pipeline's loop does with its denoiser's outputs in a call with these arguments, and whether the guard expects that.
        The loop runs on random numbers; nothing of it is left, and no callback is called."""
        return probe(self._pipe, self._arguments(args, kwargs), self.family)

    def forget(self) -> None:
        """No report: the last call of this thread was not guarded."""
        self._last = self._thread.last = None

    def disable(self) -> None:
        """Give the pipeline its stock class back and the graphs' memory. Nothing else was ever changed."""
        self.graphs.clear()
        if Guard.of(self._pipe) is self:  # and not a later one
            del self._pipe.__dict__[ATTRIBUTE]
            self._pipe.__class__ = self._stock

    def __enter__(self) -> Guard:
        self._outer.append(self._replaced)
        self._replaced = None
        return self

    def __exit__(self, *exception: object) -> None:
        outer = self._outer.pop()
        if outer is None:
            self.disable()
        else:
            if outer[1] != self.options:
                self.graphs.clear()  # those of the inner options
            self.policy, self.options, self.unguided = outer

    def run(self, args: tuple, kwargs: dict) -> Any:
        """One call of the pipeline: the stock loop on a stand-in that holds shadows. Calls of one object run one after the other.

        RuntimeError where its first call was to be probed and the loop does otherwise than its family says.
        """
        pipe, values = self._pipe, self._arguments(args, kwargs)
        if not self.probed:
            found = probe(pipe, values, self.family)
            if contradictions := found.contradictions():
                raise RuntimeError(f"{self._stock.__name__}: the guard does not know this loop: {contradictions[0]}")
            if self.family.name == UNKNOWN:
                self.family = found.family
            self.probed = True
        if not self.steps_checked:
            self.steps_checked = True
            listed = any(values.get(name) is not None for name in ("timesteps", "sigmas"))
            for note in elsewhere(self.policy, {"steps": None if listed else values.get("num_inference_steps")}):
                logger.warning(note)
        family = self.family
        denoiser: Any = next(iter(parts_of(pipe, family.denoisers).values()), None)
        reason = family.refusal(pipe, values)
        if reason is None and getattr(denoiser, "dtype", None) == torch.float64:
            reason = f"{type(denoiser).__name__} is torch.float64: a guarded call takes float16, bfloat16 or float32; disable the guard for float64"
        if reason is not None:
            self.forget()
            raise ValueError(reason)
        with held(pipe, "pipeline"), held(pipe.scheduler, "scheduler"):
            call: Call | OwnCombination
            if isinstance(family, Fused):
                runner = self.options.lend(denoiser, self.graphs)
                call = Call(self.policy, family, values, pipe, runner, unguided=self.unguided)
            else:
                call = OwnCombination(self.policy, family, values, pipe, unguided=self.unguided)
                if (capture := self.options.capture) in ("step", "loop"):
                    call.reasons.append(f"capture={capture!r} became 'off': the pipeline runs its denoiser itself")
            self._replaced, self.in_a_call = None, True
            with closing(call):
                try:
                    result = self._stock.__call__(call.stand_in, *args, **kwargs)
                    call.finish()
                    return result
                finally:
                    self.in_a_call = False
                    self._last = self._thread.last = call.report()

    def _arguments(self, args: tuple, kwargs: dict) -> Mapping[str, Any]:
        """The arguments of a call by name, with the defaults of what is not given.

        By the signature that the class had when it was enabled where somebody has wrapped its call in a function that names none.
        """
        now = inspect.signature(self._stock.__call__)
        for signature in (now, self._signature):
            if {"prompt", "prompt_embeds", "num_inference_steps"} & signature.parameters.keys():
                return by_name(signature, self._pipe, *args, **kwargs)
        raise TypeError(
            f"{self._stock.__name__}.__call__ was replaced by a function whose signature names no arguments ({now}), so the "
            f"guard cannot read them: use functools.wraps there, or enable the guard before"
        )
