"""A lock per pipeline and per scheduler: both keep the state of a loop on themselves, so they serve one guarded call at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastguard.pipelines.shadow import original_of

_registry = threading.Lock()
_locks: weakref.WeakKeyDictionary[Any, _Lock] = weakref.WeakKeyDictionary()


class _Lock:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None


@contextmanager
def held(shared: Any, what: str) -> Iterator[None]:
    """Hold the lock of a pipeline or scheduler; calls of other threads wait for it.

    RuntimeError where this thread holds it already: a callback calls its own pipeline, or another one that shares its scheduler.
    """
    shared = original_of(shared)
    with _registry:
        lock = _locks.setdefault(shared, _Lock())
    thread = threading.get_ident()
    if lock.holder == thread:
        name = type(shared).__name__
        remedy = {
            "pipeline": f"call another one over the same parts, {name}(**pipe.components) with a scheduler of its own",
            "scheduler": "give that pipeline a scheduler of its own, type(s).from_config(s.config)",
        }
        raise RuntimeError(
            f"this thread is in the middle of a guarded call with this {what} ({name}), which keeps the state of its loop: {remedy[what]}"
        )
    with lock.lock:
        lock.holder = thread
        try:
            yield
        finally:
            lock.holder = None
