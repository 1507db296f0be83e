"""Shadows: objects that share another object's whole state under a subclass with a few methods replaced.

A pipeline's scheduler and denoiser may be shared with other pipelines and with other threads, and accelerate replaces
`module.forward` on the instance. So nothing is ever patched: during a call the pipeline holds a shadow, whose `__dict__` *is* the
original's, whose class bears the same name, and whose replaced methods talk to the call that made it. Everything else, from
`isinstance` to `.config`, `.to()` or a LoRA scale, reads and writes the original. The pipeline whose loop runs is a shadow, too: so
what a callback changes on it or on the original is seen by both.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any


@functools.lru_cache(maxsize=256)
def _shadow_class(original: type, names: tuple[str, ...]) -> type:
    """What is shown instead lies in slots, for the instance's __dict__ belongs to the original. They come before what lies there, where
    somebody may have hooked a method, and before the class's `__call__`; and to read one runs no Python."""
    namespace: dict[str, Any] = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if original.__reduce_ex__ is object.__reduce_ex__:  # a copy is one of the original
        namespace["__reduce_ex__"] = lambda self, protocol: (object.__new__, (original,), dict(self.__dict__))
    namespace["__slots__"] = ("_fastguard_original", *names)
    return type(original)(original.__name__, (original,), namespace)


def shadow(original: Any, methods: Mapping[str, Callable], parts: Mapping[str, Any] | None = None) -> Any:
    """An object that is `original` in all but its `methods` and `parts`: attributes under which it shows another object.

    A method that the original has not is not added. To set a part on the shadow is the pipeline's class's affair (`enabled`).
    """
    shown = dict(parts or {})
    for name, method in methods.items():
        if hasattr(original, name):
            # Pipelines read the signature of scheduler.step, to learn whether it takes eta or a generator; a bound method could not show it.
            shown[name] = functools.update_wrapper(functools.partial(method), getattr(original, name))
    kind: Any = type(original)
    stand_in: Any = object.__new__(_shadow_class(kind, tuple(shown)))
    for name, value in {**shown, "_fastguard_original": original, "__dict__": original.__dict__}.items():
        object.__setattr__(stand_in, name, value)
    return stand_in


def original_of(shown: Any) -> Any:
    """The object behind a shadow; any other object itself."""
    return shown._fastguard_original if hasattr(type(shown), "_fastguard_original") else shown
