"""The class that an enabled pipeline object has: its own, but for what asks the guard."""

import functools
import inspect
import logging
import os
from typing import Any

from fastguard.pipelines.shadow import original_of

logger = logging.getLogger("fastguard")

ATTRIBUTE = "_fastguard_guard"  # of the pipeline object


def guard_of(pipe: Any) -> Any:
    """The guard of a pipeline (or of the stand-in that a callback gets); None if it has none."""
    return pipe.__dict__.get(ATTRIBUTE)


def guard_disabled() -> bool:
    """Whether the environment switches the guard off: then every call is a stock call, without a report."""
    return os.environ.get("FASTGUARD_DISABLE", "0") not in ("", "0")


@functools.lru_cache(maxsize=256)
def enabled_class(base: Any) -> type:
    """A subclass of `base` with its very name and module: model_index.json, isinstance and AutoPipeline see no difference."""

    def without_no_grad(self, *args, **kwargs):
        raise RuntimeError("gradients through a guarded call are not supported; disable the guard to call without it")

    class Enabled(base):
        __module__, __qualname__, __doc__ = base.__module__, base.__qualname__, base.__doc__
        _fastguard_stock = base

        @functools.wraps(base.__call__)
        def __call__(self, *args, **kwargs):
            guard = guard_of(self)
            if guard is not None and guard_disabled():
                logger.info("FASTGUARD_DISABLE is set: stock call")
                guard.forget()
                guard = None
            # Stock as the class has it now: somebody may patch it.
            return base.__call__(self, *args, **kwargs) if guard is None else guard.run(args, kwargs)

        vars(__call__).update(__signature__=inspect.signature(base.__call__), __wrapped__=without_no_grad)

        def __setattr__(self, name, value):  # also of the stand-in that a callback gets
            guard = self.__dict__.get(ATTRIBUTE)
            if guard is not None and name in ("scheduler", *guard.family.denoisers):
                if guard.in_a_call:
                    if original_of(value) is self.__dict__.get(name):
                        return
                    raise RuntimeError(
                        f"{base.__name__}.{name} was replaced during a guarded call, which works on the one it began with"
                    )
                if name != "scheduler":
                    guard.graphs.clear()  # nothing here keeps a denoiser that the pipeline has given up
            super().__setattr__(name, value)

        @property
        def components(self):
            # A loop's stand-in shows stand-ins of its parts: who builds another pipeline of them wants the originals.
            return {name: vars(self).get(name, part) for name, part in super().components.items()}

        def __reduce_ex__(self, protocol):
            # Copies and pickles are stock pipelines: a guard is never inherited silently.
            return object.__new__, (base,), {key: value for key, value in self.__dict__.items() if key != ATTRIBUTE}

    Enabled.__name__ = base.__name__
    return Enabled


def stock_class(cls: type) -> type:
    """Also of the stand-in that a callback gets."""
    return getattr(cls, "_fastguard_stock", cls)
