"""What a scheduler's table depends on, as a key of the cache."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np
import torch

from fastguard.schedules.scheduler_state import functions, own_state, replaced_step

# What `repr` says all of. No subclasses: theirs may say anything.
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_DEEPEST = 8


def key_of(scheduler: Any, arguments: Mapping[str, Any], begin: int) -> tuple | None:
    """None if no key says all that the table depends on.

    The class and its functions are themselves part of it: kept alive, so that no later ones can be taken for them.
    """
    state = [replaced_step(scheduler), begin, *(dict(sorted(d.items())) for d in (arguments, own_state(scheduler)))]
    try:
        return type(scheduler), functions(type(scheduler)), _value(state)
    except TypeError:
        return None


def _value(value: Any, depth: int = 0) -> Hashable:
    """What it says. TypeError if nothing does: an object whose state nobody can name, or a function that reads from outside itself."""
    kind = type(value)
    if kind in _SCALARS or isinstance(value, (Enum, np.generic)):
        return kind, repr(value)
    if depth > _DEEPEST:
        raise TypeError("too deep, or it holds itself")
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    elif kind is FunctionType and not value.__closure__ and not value.__code__.co_names:
        code = value.__code__
        value = [code.co_code, code.co_consts, value.__defaults__, value.__kwdefaults__]
    elif kind is torch.Tensor:
        value = value.detach().cpu().contiguous()
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif kind is np.ndarray and not value.dtype.hasobject:
        return value.dtype, value.shape, value.tobytes()
    elif kind not in (list, tuple):
        raise TypeError(f"nobody can name a {kind.__name__}")
    return kind, tuple(_value(item, depth + 1) for item in value)
