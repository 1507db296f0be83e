"""What a diffusers scheduler holds: its configuration, what somebody set on it, and what it remembers of a run; a cache's key of it."""

import functools
import inspect
from collections.abc import Hashable, Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import numpy as np
import torch

# What a scheduler remembers of a run, as it stands after set_timesteps (lists keep their length).
RUN_STATE: dict[str, Any] = {
    **dict.fromkeys(("_step_index", "cur_sample", "sample", "last_sample", "last_noise", "prev_derivative", "dt")),
    **dict.fromkeys(("counter", "lower_order_nums", "cur_model_output"), 0),
    **{"ets": [], "derivatives": [], "model_outputs": [None], "timestep_list": [None], "is_scale_input_called": False},
}

# What `repr` says all of. No subclasses: theirs may say anything.
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

# Methods that the pipeline calls on the scheduler itself, outside of step().
OUTSIDE = ("set_timesteps", "set_begin_index", "add_noise", "scale_noise", "get_velocity")


def functions(kind: type) -> tuple[Any, ...]:
    """Everything that a class and its bases define, as it stands: what somebody patches there changes what step() does."""
    values = [value for base in kind.__mro__ for value in vars(base).values()]
    return tuple(v for v in values if callable(v) or isinstance(v, (staticmethod, classmethod, property)))


def signature(scheduler: Any) -> dict[str, Any]:
    """What a row's numbers hang on, to be compared between two rows (`changed`); reads nothing from the device."""
    kind: Any = type(scheduler)
    own = _mentioned(kind)  # a caller may keep things of its own there
    names = [name for name in vars(scheduler) if name not in RUN_STATE and (name in own or hasattr(kind, name))]
    return {name: _mark(vars(scheduler)[name]) for name in names}


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of what differs between two signatures, but for tensors that were only moved: add_noise moves a schedule to the latents."""
    return sorted(name for name in {*then, *now} if not _alike(then.get(name), now.get(name)))


@functools.lru_cache(maxsize=64)
def _mentioned(kind: type) -> frozenset[str]:
    """The names that the code of a class mentions, its attributes among them."""
    plain = [getattr(value, "__func__", None) or getattr(value, "fget", None) or value for value in functions(kind)]
    codes = [getattr(inspect.unwrap(value), "__code__", None) for value in plain]
    return frozenset(name for code in codes for name in getattr(code, "co_names", ()))


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.device, value.shape, value.dtype, id(value), None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, list):
        return id(value), tuple(map(_mark, value))
    return value if isinstance(value, (bool, int, float, str)) else id(value)


def _alike(then: Any, now: Any) -> bool:
    both = isinstance(then, tuple) and isinstance(now, tuple) and isinstance(then[0], torch.device)
    return then == now or (both and then[0] != now[0] and then[1:3] == now[1:3])


def own_state(scheduler: Any) -> dict[str, Any]:
    """The scheduler's attributes as they stand before a run, without methods that someone wrapped on the instance."""
    replaced = hooked(scheduler)
    state = {name: value for name, value in vars(scheduler).items() if name not in replaced}
    starts = {name: RUN_STATE[name] for name in state if name in RUN_STATE}
    return state | {name: s * len(state[name] or []) if isinstance(s, list) else s for name, s in starts.items()}


def at_the_start(scheduler: Any) -> Any:
    """Another scheduler as this one stands before a run, whatever was set on it, with its tensors on the CPU; they share no tensor and no list."""
    fresh = object.__new__(type(scheduler))
    fresh.__dict__.update({name: _clone(value) for name, value in own_state(scheduler).items()})
    return fresh


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, list):
        return [_clone(item) for item in value]
    if isinstance(value, (np.ndarray, set)):
        return value.copy()
    return value  # numbers, strings, functions and the frozen config


def foreign(scheduler: Any) -> str | None:
    """Why nothing is assumed of a scheduler's class: it is not diffusers' own, so that its step() may do and record anything.

    A class whose step() is linear in sample, output and noise, and does nothing else, says so by `fastguard_linear = True`.
    """
    kind = type(scheduler)
    if kind.__module__.partition(".")[0] == "diffusers" or vars(kind).get("fastguard_linear") is True:
        return None
    return f"{kind.__name__} is not diffusers' own and does not say fastguard_linear = True"


def hooked(scheduler: Any) -> list[str]:
    """Names of the methods that somebody replaced on the instance."""
    return [name for name, value in vars(scheduler).items() if callable(value) and hasattr(type(scheduler), name)]


def replaced_step(scheduler: Any) -> str | None:
    """Why step() is not the class's own, or what it calls is not: somebody hooks it, and must see every call of it."""
    if names := [name for name in hooked(scheduler) if name not in OUTSIDE]:
        return f"{names[0]}() is replaced on the instance"
    owner = next(kind for kind in type(scheduler).__mro__ if "step" in vars(kind))
    step = vars(owner)["step"]
    if getattr(step, "__qualname__", None) != f"{owner.__qualname__}.step" or hasattr(step, "__wrapped__"):
        return f"{owner.__name__}.step is replaced"
    return None


def key_of(scheduler: Any, arguments: Mapping[str, Any], begin: int) -> tuple | None:
    """None if no key says all that the table depends on.

    The class and its functions are themselves part of it: kept alive, so that no later ones can be taken for them.
    """
    state = [replaced_step(scheduler), begin, *(dict(sorted(d.items())) for d in (arguments, own_state(scheduler)))]
    try:
        return type(scheduler), functions(type(scheduler)), _value(state)
    except (TypeError, RecursionError):  # it may hold itself
        return None


def _value(value: Any) -> Hashable:
    """What it says. TypeError if nothing does: an object whose state nobody can name, or a function that reads from outside itself."""
    kind = type(value)
    if kind in _SCALARS or isinstance(value, (Enum, np.generic)):
        return kind, repr(value)
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
    return kind, tuple(_value(item) for item in value)
