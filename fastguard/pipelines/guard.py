"""Attach the guard to one pipeline object, and take it off again."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastguard.capture.graphs import Graphs
from fastguard.capture.options import Engine
from fastguard.capture.tune import Tuning, tune
from fastguard.loop.report import Report
from fastguard.pipelines.call import Call
from fastguard.pipelines.families import Family, OwnFamily, find
from fastguard.pipelines.own_combination import OwnCombination, first_denoiser
from fastguard.pipelines.pending import settled
from fastguard.pipelines.shadow import shadow
from fastguard.pipelines.tokenizers import TOKENIZERS, one_at_a_time
from fastguard.policies.policy import Policy
from fastguard.policies.presets import DEFAULT
from fastguard.policies.presets import policy as make_policy
from fastguard.schedules.scheduler_state import at_the_start, hooked

logger = logging.getLogger("fastguard")

_ATTRIBUTE = "_fastguard_guard"


def enable(
    pipe: Any,
    policy: str | Policy | Sequence[str | Policy] = DEFAULT,
    *,
    capture: str = "auto",
    attention_backend: str | None = None,
    compile: bool | Mapping[str, Any] = False,
    **overrides: Any,
) -> Guard:
    """Guard `pipe` in place: the same calls, the same outputs, under `policy`. Also a context manager.

    pipe       a diffusers pipeline on the allow-list (`fastguard.pipelines.families`)
    policy     a preset's name, a policy, a path to a policy file, or a list of them: one per image (or per prompt) of every call
    capture    CUDA graphs: "off", "step" (each row is one launch), "loop" (Stable Diffusion and SDXL text-to-image: the generation
               is one launch; else as "step"), "auto" ("step" on CUDA for small batches and latents, see docs/capture.md, else
               "off"). What cannot be recorded runs eagerly, and the report says why
    attention_backend  who computes the denoiser's attention: one of diffusers' names ("native", "xformers", "flash", ...); None:
               whatever the model does
    compile    torch.compile the denoiser for the guard's calls: True, or a dictionary of its arguments
    overrides  fields of the policy to replace, e.g. gate=0.02

    Enabling a guarded pipeline again replaces policy and options; `with enable(...)` gives back
    what it replaced. FASTGUARD_DISABLE=1 in the environment makes every call a stock
    call. TypeError for a pipeline that is not supported, ValueError for a bad policy or an option that cannot work here.
    """
    base = _stock_class(type(pipe))
    family = find(base)
    chosen = make_policy(policy, **overrides)
    engine = Engine.of(
        first_denoiser(pipe, family),
        capture=capture,
        attention_backend=attention_backend,
        compile=compile,
    )
    warning = chosen.ungated_warning()
    guard = pipe.__dict__.get(_ATTRIBUTE)
    if warning and not (guard and guard.policy == chosen):
        logger.warning(warning)
    if guard is None:
        guard = pipe.__dict__[_ATTRIBUTE] = Guard(pipe, family, chosen, engine)
        pipe.__class__ = _enabled_class(base)
    else:
        guard._replaced = guard.policy, guard.engine
        guard.policy = chosen
        guard.use(engine)
    return guard


class Guard:
    """The guard of one pipeline: its policy, the report of the last call, and the way back."""

    def __init__(self, pipe: Any, family: Family, policy: Policy, engine: Engine) -> None:
        self.policy = policy
        self.family = family
        self.engine = engine
        self.graphs = Graphs()
        self._pipe = pipe
        self._replaced: tuple[Policy, Engine] | None = None  # by the last `enable`
        self._outer: list[tuple[Policy, Engine] | None] = []  # what each `with` goes back to; None: the stock pipeline
        self._last: Report | None = None
        self._thread = threading.local()

    @property
    def report(self) -> Report | None:
        """What happened, per image, in the last call made by this thread (or, if it made none, by any)."""
        return getattr(self._thread, "last", None) or self._last

    def use(self, engine: Engine) -> None:
        """Run the denoiser in another way from the next call on. Graphs are kept: their keys hold these options."""
        self.engine = engine

    def tune(self, *args: Any, **kwargs: Any) -> Tuning:
        """Make the same call under every capture mode, keep the fastest, and return what each cost. Arguments as of the pipeline."""
        tuning = tune(self, self._pipe, args, kwargs)
        self.use(dataclasses.replace(self.engine, capture=tuning.chosen))
        return tuning

    def forget(self) -> None:
        """No report: the last call of this thread was not guarded."""
        self._last = self._thread.last = None

    def disable(self) -> None:
        """Give the pipeline its stock class back and the graphs' memory. Nothing else was ever changed."""
        self.graphs.clear()
        if self._pipe.__dict__.get(_ATTRIBUTE) is self:  # and not a later one
            del self._pipe.__dict__[_ATTRIBUTE]
            self._pipe.__class__ = _stock_class(type(self._pipe))
            self._pipe.__dict__.update(_plain_interrupt(self._pipe.__dict__))

    def __enter__(self) -> Guard:
        self._outer.append(self._replaced)
        self._replaced = None
        return self

    def __exit__(self, *exception: object) -> None:
        outer = self._outer.pop()
        if outer is None:
            self.disable()
        else:
            if outer[1] != self.engine:
                self.graphs.clear()  # those of the inner options
            self.policy, self.engine = outer

    def run(self, stock_call: Any, args: tuple, kwargs: dict) -> Any:
        """One call of the pipeline: the stock loop on a copy of the pipeline that holds shadows."""
        pipe, family = self._pipe, self.family
        arguments = inspect.signature(stock_call).bind(pipe, *args, **kwargs)
        arguments.apply_defaults()
        values = {**arguments.arguments, **arguments.arguments.get("kwargs", {})}
        own = isinstance(family, OwnFamily)
        reason = family.refusal(pipe, values) if own else family.refusal(values) or _unseen(values)
        if reason:
            self.forget()
            raise ValueError(reason)
        denoiser = first_denoiser(pipe, family)
        if getattr(denoiser, "dtype", None) == torch.float64:
            raise ValueError(
                f"{type(denoiser).__name__} is torch.float64: a guarded call takes float16, bfloat16 or float32; disable the guard for float64"
            )
        with _claimed(pipe) as alone, _claimed(pipe.scheduler) as free:
            # The loop's own pipeline: its state is the original's, unless another call is at work on that at this moment.
            state = pipe if alone else _copy(pipe)
            # Schedulers keep the state of a loop on themselves.
            scheduler = pipe.scheduler if free else _another(pipe.scheduler)
            if own:
                return self._run_own(stock_call, args, kwargs, values, state, scheduler)
            runs, capturing = self.engine.lend(denoiser, self.graphs)
            call = Call(self.policy, family, values, scheduler, runs, capturing)
            methods: dict[str, Callable] = {
                "step": call.step,
                "scale_model_input": call.scale_model_input,
                "set_timesteps": call.set_timesteps,
            }
            parts = {
                "scheduler": shadow(scheduler, methods),
                family.denoiser: shadow(denoiser, {"__call__": call.denoise}),
                **{
                    name: one_at_a_time(pipe.__dict__[name])
                    for name in TOKENIZERS
                    if pipe.__dict__.get(name) is not None
                },
            }
            replacements: dict[str, Callable] = {
                "progress_bar": _before(call.begin, call.counted(state.progress_bar)),
                # Offloading replaces the pipeline's hooks at the end of a call: they belong to the original.
                "maybe_free_model_hooks": pipe.maybe_free_model_hooks,
            }
            if hasattr(pipe, "prepare_latents"):
                replacements["prepare_latents"] = lambda *a, **k: call.prepare_latents(
                    _prepare(state, call.pipe, *a, **k)
                )
            call.attach(shadow(state, replacements, parts))
            if alone and hasattr(pipe, "_interrupt"):
                pipe._interrupt = False
            self._replaced = None
            try:
                return settled(stock_call(call.pipe, *args, **kwargs))
            finally:
                try:
                    self._last = self._thread.last = call.report()
                finally:
                    call.close()

    def _run_own(self, stock_call: Any, args: tuple, kwargs: dict, values: dict, state: Any, scheduler: Any) -> Any:
        """One call of a pipeline that combines its branches itself."""
        pipe, family = self._pipe, self.family
        denoisers = {name: part for name in family.denoisers if (part := getattr(pipe, name, None)) is not None}
        call = OwnCombination(self.policy, family, values, scheduler, denoisers)
        parts = {
            "scheduler": shadow(scheduler, call.methods()),
            **{
                name: shadow(part, {"__call__": functools.partial(call.denoise, name)})
                for name, part in denoisers.items()
            },
        }
        # Offloading replaces the pipeline's hooks at the end of a call: they belong to the original.
        call.attach(shadow(state, {"maybe_free_model_hooks": pipe.maybe_free_model_hooks}, parts))
        self._replaced = None
        try:
            result = stock_call(call.pipe, *args, **kwargs)
            call.finish()
            return result
        finally:
            self._last = self._thread.last = call.report()


def _unseen(arguments: Mapping[str, Any]) -> str | None:
    """What a callback asks for and no guarded call has: the pipeline's own guidance arithmetic runs on placeholders."""
    wanted = set(arguments.get("callback_on_step_end_tensor_inputs") or ()) & {
        "noise_pred",
        "noise_pred_text",
        "noise_pred_uncond",
    }
    if not wanted:
        return None
    return (
        f"callback_on_step_end_tensor_inputs holds {min(wanted)!r}, which is formed inside the fused step and not seen outside; leave it "
        f"out, or call the pipeline without the guard"
    )


def _another(scheduler: Any) -> Any:
    """A scheduler for a call that finds `scheduler` at work for another."""
    if names := hooked(scheduler):
        raise RuntimeError(
            f"pipe.scheduler.{names[0]} is replaced on the instance, and another call is at work with that scheduler: what replaces it "
            f"can serve one call at a time; give each pipeline a scheduler of its own, or call one after the other"
        )
    return at_the_start(scheduler)


def _copy(pipe: Any) -> Any:
    twin = object.__new__(type(pipe))
    twin.__dict__.update(pipe.__dict__)
    # An interrupt that is still standing was meant for the call that runs already.
    standing = pipe.__dict__.get("_interrupt")
    twin.__dict__["_fastguard_origin"] = None if standing and not isinstance(standing, _Own) else pipe
    return twin


def _prepare(state: Any, loop: Any, *args: Any, **kwargs: Any) -> Any:
    """The pipeline's own prepare_latents, with the scheduler of this call: another call may be at work on the original."""
    hooked = state.__dict__.get("prepare_latents")
    return type(state).prepare_latents(loop, *args, **kwargs) if hooked is None else hooked(*args, **kwargs)


def _before(first: Callable[[], None], function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return function(*args, **kwargs)

    return call


@functools.lru_cache(maxsize=256)
def _enabled_class(base: Any) -> type:
    """A subclass of `base` with its very name and module: model_index.json, isinstance and AutoPipeline see no difference."""
    stock_call = base.__call__

    @functools.wraps(stock_call)
    def __call__(self, *args, **kwargs):
        guard = self.__dict__.get(_ATTRIBUTE)
        if guard is None:
            return stock_call(self, *args, **kwargs)
        if os.environ.get("FASTGUARD_DISABLE", "0") not in ("", "0"):
            logger.info("FASTGUARD_DISABLE is set: stock call")
            guard.forget()
            return stock_call(self, *args, **kwargs)
        return guard.run(stock_call, args, kwargs)

    def interrupt(self):
        # During a call the loop runs on a copy; who interrupts may hold the original.
        elsewhere = getattr(self.__dict__.get("_fastguard_origin"), "_interrupt", False)
        return bool(self._interrupt or (elsewhere and not isinstance(elsewhere, _Own)))

    def __setattr__(self, name, value):
        # A callback is given a stand-in of the pipeline: what it interrupts there is its own call, and no other.
        if name == "_interrupt" and value and type(self) is not enabled:
            value = vars(self).get("_interrupt") or _Own(value)
        super(enabled, self).__setattr__(name, value)

    def components(self):
        # A loop's own pipeline shows stand-ins of its parts: who builds another pipeline of them wants the originals.
        return {name: vars(self).get(name, part) for name, part in base.components.fget(self).items()}

    def __reduce_ex__(self, protocol):
        # Copies and pickles are stock pipelines: a guard is never inherited silently.
        state = {key: value for key, value in self.__dict__.items() if key != _ATTRIBUTE}
        state.update(_plain_interrupt(state))
        return object.__new__, (base,), state

    namespace = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_fastguard_stock": base,
        "components": property(components),
    }
    if hasattr(base, "interrupt"):
        namespace.update(interrupt=property(interrupt), __setattr__=__setattr__)
    enabled = type(base)(base.__name__, (base,), namespace)
    return enabled


class _Own(int):
    """An interrupt of one call, true as any other. The state in which it lies is the pipeline's, whose other calls go on."""


def _plain_interrupt(state: Mapping[str, Any]) -> dict[str, Any]:
    """As stock would have it."""
    return {"_interrupt": bool(state["_interrupt"])} if "_interrupt" in state else {}


def _stock_class(cls: type) -> type:
    """Also of the stand-in that a callback gets."""
    return next((vars(base)["_fastguard_stock"] for base in cls.__mro__ if "_fastguard_stock" in vars(base)), cls)


_busy: set[int] = set()
_busy_lock = threading.Lock()


@contextmanager
def _claimed(shared: Any) -> Iterator[bool]:
    """Whether the object is ours until the end: False while another call has it."""
    with _busy_lock:
        free = id(shared) not in _busy
        _busy.add(id(shared))
    try:
        yield free
    finally:
        if free:
            with _busy_lock:
                _busy.discard(id(shared))
