"""Tokenizers that several threads share.

A fast tokenizer keeps padding and truncation on itself: it sets them, then encodes. Pipelines tokenize a prompt twice, padded to the
model's length and to the longest prompt, so of two threads one can get the other's padding: another text, another image, no error.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from fastguard.pipelines.shadow import shadow

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # components of the supported pipelines
_METHODS = ("__call__", "encode", "tokenize")  # those that set before they encode

_locks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


def one_at_a_time(tokenizer: Any) -> Any:
    """A shadow of the tokenizer that encodes for one thread after the other, whichever guarded calls share it."""
    with _registry:
        lock = _locks.setdefault(tokenizer, threading.RLock())

    def locked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return method(*args, **kwargs)

        return call

    return shadow(tokenizer, {name: locked(getattr(tokenizer, name)) for name in _METHODS if hasattr(tokenizer, name)})
