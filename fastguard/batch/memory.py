"""Out of memory: told from other errors, and met by doing half as much at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def free() -> None:
    """Give back what is cached."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halving(work: Callable[[Any], R], items: Sequence[T]) -> list[R]:
    """[work(items)], or the results of its halves where the memory is not enough; of single items the error is raised."""
    try:
        return [work(items)]
    except Exception as error:
        if not out_of_memory(error) or len(items) == 1:
            raise
    free()
    middle = (len(items) + 1) // 2
    return halving(work, items[:middle]) + halving(work, items[middle:])
