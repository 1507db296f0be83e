"""Shadows: objects that share another object's whole state under a subclass with a few methods replaced.

A pipeline's scheduler and denoiser may be shared with other pipelines and with other threads, and accelerate replaces
`module.forward` on the instance. So nothing is ever patched: during a call the pipeline holds a shadow, whose `__dict__` *is* the
original's, whose class bears the same name, and whose replaced methods talk to the call that made it. Everything else, from
`isinstance` to `.config`, `.to()` or a LoRA scale, reads and writes the original. The pipeline whose loop runs is a shadow, too: so
what a callback changes on it or on the original is seen by both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


@functools.lru_cache(maxsize=256)
def _shadow_class(original: type, names: tuple[str, ...], parts: tuple[str, ...]) -> type:
    def replaced(name: str) -> Any:
        if name == "__call__":  # Python looks it up on the class and calls it: no property
            return lambda self, *args, **kwargs: self._fastguard_replacements[name](*args, **kwargs)
        # A property, because it comes before an attribute of the instance: somebody may have hooked the method there.
        return property(lambda self: self._fastguard_replacements[name])

    namespace: dict[str, Any] = {name: replaced(name) for name in names}
    if parts:
        namespace.update({name: _part(name) for name in parts}, __setattr__=_set)
    if original.__reduce_ex__ is object.__reduce_ex__:  # a copy is one of the original
        namespace["__reduce_ex__"] = lambda self, protocol: (object.__new__, (original,), dict(self.__dict__))
    # Slots, because the instance __dict__ belongs to the original.
    namespace["__slots__"] = ("_fastguard_original", "_fastguard_parts", "_fastguard_replacements")
    namespace["__module__"] = original.__module__
    namespace["__qualname__"] = original.__qualname__
    namespace["__doc__"] = original.__doc__
    return type(original)(original.__name__, (original,), namespace)


def _part(name: str) -> property:
    def get(self: Any) -> Any:
        own, shown = self._fastguard_parts[name]
        return shown if self.__dict__[name] is own else _refuse(self, name)

    return property(get)  # what sets it is _set


def _set(self: Any, name: str, value: Any) -> None:
    """Before the pipeline's own __setattr__, which would note the new part in its configuration."""
    if name not in self._fastguard_parts:
        super(type(self), self).__setattr__(name, value)
    elif not any(value is one for one in self._fastguard_parts[name]):
        _refuse(self, name)


def _refuse(self: Any, name: str) -> NoReturn:
    raise RuntimeError(
        f"{type(self).__name__}.{name} was replaced during a guarded call, which works on the one it began with"
    )


def shadow(
    original: Any, replacements: dict[str, Callable], parts: dict[str, Any] | None = None, adds: tuple[str, ...] = ()
) -> Any:
    """An object that is `original` in all but the methods named in `replacements`; one that it has not is added if `adds` names it.

    parts: attributes that it shows another object for. RuntimeError where one of them is replaced, on either object.
    """
    # wraps: pipelines read the signature of scheduler.step to learn whether it takes eta or a generator.
    wrapped = {
        name: functools.wraps(getattr(original, name, method))(_function(method))
        for name, method in replacements.items()
        if hasattr(original, name) or name in adds
    }
    kind: Any = type(original)
    shown = {name: (original.__dict__[name], part) for name, part in (parts or {}).items()}
    stand_in: Any = object.__new__(_shadow_class(kind, tuple(wrapped), tuple(shown)))
    object.__setattr__(stand_in, "_fastguard_original", original)
    object.__setattr__(stand_in, "_fastguard_replacements", wrapped)
    object.__setattr__(stand_in, "_fastguard_parts", shown)
    object.__setattr__(stand_in, "__dict__", original.__dict__)
    return stand_in


def original_of(shown: Any) -> Any:
    """The object behind a shadow; any other object itself."""
    return shown._fastguard_original if hasattr(type(shown), "_fastguard_original") else shown


def _function(method: Callable) -> Callable:
    """A function around a bound method, which itself takes no attributes."""
    return lambda *args, **kwargs: method(*args, **kwargs)


def stand_in(
    pipe: Any,
    scheduler: Mapping[str, Callable],
    denoisers: Mapping[str, Callable],
    methods: Mapping[str, Callable] | None = None,
) -> Any:
    """A pipeline for one stock loop: methods of its scheduler, the calls of its denoisers, and some methods of its own are replaced."""
    parts = {name: shadow(getattr(pipe, name), {"__call__": call}) for name, call in denoisers.items()}
    methods_of_scheduler = dict(scheduler)
    adds: tuple[str, ...] = ()
    if not hasattr(pipe.scheduler, "scale_model_input"):
        # BriaPipeline calls it unless the scheduler's type is FlowMatchEulerDiscreteScheduler itself, which a shadow's never is.
        methods_of_scheduler["scale_model_input"] = lambda sample, timestep=None: sample
        adds = ("scale_model_input",)
    parts["scheduler"] = shadow(pipe.scheduler, methods_of_scheduler, adds=adds)
    # Offloading replaces the pipeline's hooks at the end of a call: they belong to the original.
    return shadow(pipe, {"maybe_free_model_hooks": pipe.maybe_free_model_hooks, **(methods or {})}, parts)
