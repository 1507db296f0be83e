"""Shadows: objects that share another object's whole state under a subclass with a few methods replaced.

A pipeline's scheduler and denoiser may be shared with other pipelines and with other threads, and accelerate replaces
`module.forward` on the instance. So nothing is ever patched: during a call the pipeline holds a shadow, whose `__dict__` *is* the
original's, whose class bears the same name, and whose replaced methods talk to the call that made it. Everything else, from
`isinstance` to `.config`, `.to()` or a LoRA scale, reads and writes the original.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


@functools.lru_cache(maxsize=256)
def _shadow_class(original: type, methods: tuple[str, ...]) -> type:
    def replacement(name: str) -> Callable:
        method = inspect.getattr_static(original, name)

        # wraps: pipelines read the signature of scheduler.step to learn whether it takes eta or a generator.
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            return self._fastguard_replacements[name](*args, **kwargs)

        return call

    namespace: dict[str, Any] = {name: replacement(name) for name in methods}
    # A slot, because the instance __dict__ belongs to the original.
    namespace["__slots__"] = ("_fastguard_replacements",)
    namespace["__module__"] = original.__module__
    namespace["__qualname__"] = original.__qualname__
    namespace["__doc__"] = original.__doc__
    return type(original)(original.__name__, (original,), namespace)


def shadow(original: Any, replacements: dict[str, Callable]) -> Any:
    """An object that is `original` in all but the methods named in `replacements`."""
    names = tuple(name for name in replacements if hasattr(type(original), name))
    twin = object.__new__(_shadow_class(type(original), names))
    object.__setattr__(twin, "_fastguard_replacements", replacements)
    object.__setattr__(twin, "__dict__", original.__dict__)
    return twin
