"""Pipelines and schedulers keep the state of a loop on themselves, so they serve one guarded call at a time."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastguard.pipelines.shadow import original_of

_given_back = threading.Condition()
_holders: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # threads


@contextmanager
def held(shared: Any, what: str) -> Iterator[None]:
    """Hold a pipeline or scheduler; calls of other threads wait for it.

    RuntimeError where this thread holds it already: a callback calls its own pipeline, or another one that shares its scheduler.
    """
    shared, thread = original_of(shared), threading.get_ident()
    with _given_back:
        if _holders.get(shared) == thread:
            name = type(shared).__name__
            remedy = {
                "pipeline": f"call another one over the same parts, {name}(**pipe.components) with a scheduler of its own",
                "scheduler": "give that pipeline a scheduler of its own, type(s).from_config(s.config)",
            }
            raise RuntimeError(
                f"this thread is in the middle of a guarded call with this {what} ({name}), which keeps the state of its loop: {remedy[what]}"
            )
        _given_back.wait_for(lambda: shared not in _holders)
        _holders[shared] = thread
    try:
        yield
    finally:
        with _given_back:
            del _holders[shared]
            _given_back.notify_all()
