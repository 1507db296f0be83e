"""What a scheduler's table depends on, as a key of the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np
import torch

from fastguard.schedules.scheduler_state import functions, own_state, replaced_step

# What `repr` says all of. No subclasses: theirs may say anything.
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEEPEST = 8


def _feed(digest: Any, value: Any, depth: int = 0) -> bool:
    """Add a value to the digest; False if it is none: an object whose state nobody can name, or a function that reads from outside itself."""
    kind = type(value)
    digest.update(kind.__name__.encode())
    if kind in _SCALARS or isinstance(value, (Enum, np.generic)):
        digest.update(repr(value).encode() + b";")
        return True
    if depth > _DEEPEST:  # or it holds itself
        return False
    if isinstance(value, Mapping):
        return _feed(digest, list(value), depth + 1) and _feed(digest, list(value.values()), depth + 1)
    if kind in (list, tuple):
        digest.update(f"{len(value)}:".encode())
        return all(_feed(digest, item, depth + 1) for item in value)
    if kind is torch.Tensor:
        value = value.detach().cpu().contiguous()
        digest.update(repr((value.dtype, value.shape)).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return True
    if kind is np.ndarray and not value.dtype.hasobject:
        digest.update(repr((value.dtype, value.shape)).encode() + value.tobytes())
        return True
    if kind is FunctionType and not value.__closure__ and not value.__code__.co_names:
        code = value.__code__
        return _feed(digest, [code.co_code, code.co_consts, value.__defaults__, value.__kwdefaults__], depth + 1)
    return False


def key_of(scheduler: Any, arguments: Mapping[str, Any], begin: int) -> tuple[tuple, bytes] | None:
    """None if no key says all that the table depends on.

    The class and its functions are themselves part of it: kept alive, so that no later ones can be taken for them.
    """
    digest = hashlib.sha1(usedforsecurity=False)
    state = [
        replaced_step(scheduler),
        begin,
        dict(sorted(arguments.items())),
        dict(sorted(own_state(scheduler).items())),
    ]
    return ((type(scheduler), *functions(type(scheduler))), digest.digest()) if _feed(digest, state) else None
