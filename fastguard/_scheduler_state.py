"""What a diffusers scheduler holds: its configuration, what somebody set on it, and what it remembers of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# What a scheduler remembers of a run, as it stands after set_timesteps (lists keep their length).
RUN_STATE: dict[str, Any] = {
    "_step_index": None,
    "counter": 0,
    "lower_order_nums": 0,
    "cur_model_output": 0,
    "cur_sample": None,
    "sample": None,
    "last_sample": None,
    "last_noise": None,
    "prev_derivative": None,
    "dt": None,
    "ets": [],
    "derivatives": [],
    "model_outputs": [None],
    "timestep_list": [None],
    "is_scale_input_called": False,
}


def own_state(scheduler: Any) -> dict[str, Any]:
    """The scheduler's attributes as they stand before a run, without methods that someone wrapped on the instance."""
    state, replaced = {}, hooked(scheduler)
    for name, value in vars(scheduler).items():
        if name in replaced:
            continue
        if name in RUN_STATE:
            start = RUN_STATE[name]
            value = start * len(value or []) if isinstance(start, list) else start
        state[name] = value
    return state


def at_the_start(scheduler: Any, device: str | None = None) -> Any:
    """Another scheduler as this one stands before a run, whatever was set on it; they share no tensor and no list.

    device: of its tensors; None: where they are.
    """
    twin = object.__new__(type(scheduler))
    twin.__dict__.update({name: _clone(value, device) for name, value in own_state(scheduler).items()})
    return twin


def _clone(value: Any, device: str | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list):
        return [_clone(item, device) for item in value]
    if isinstance(value, (np.ndarray, set)):
        return value.copy()
    return value  # numbers, strings, functions and the frozen config


def hooked(scheduler: Any) -> list[str]:
    """Names of the methods that somebody replaced on the instance."""
    return [name for name, value in vars(scheduler).items() if callable(value) and hasattr(type(scheduler), name)]


def replaced_step(scheduler: Any) -> str | None:
    """Why step() is not the class's own: somebody hooks it, and must see every call of it."""
    if "step" in vars(scheduler):
        return "step() is replaced on the instance"
    owner = next(kind for kind in type(scheduler).__mro__ if "step" in vars(kind))
    step = vars(owner)["step"]
    if getattr(step, "__qualname__", None) != f"{owner.__qualname__}.step" or hasattr(step, "__wrapped__"):
        return f"{owner.__name__}.step is replaced"
    return None
