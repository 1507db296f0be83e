"""Whether a denoiser is stock: diffusers' and torch's own code alone, over plain tensors, and nobody looks at what it computes.

Such a forward may run in torch's inference mode: the same kernels and bits, without the accounting of views and versions that
makes up a few percent of a small model's forward. Whoever kept a tensor made there could not use it with autograd later. The
models of `fastguard.families` keep none; hooks, foreign layers and processors, patches, compilers and modes might, and run as they do
without a guard, under no_grad.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastguard.capture.obstacles import hooks
from fastguard.denoiser import tensors_of

FROM_ROWS = 8  # finding it all out takes as long as two to four rows gain, whatever the model's size
_LAYERS = ("diffusers.models.", "torch.nn.modules.")
# None of these keeps a tensor; some elsewhere in diffusers are there to.
_PROCESSORS = "diffusers.models.attention_processor"
_LIBRARIES = {
    "diffusers",
    "torch",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "typing_extensions",
    *sys.stdlib_module_names,
}
_LIBRARIES.remove("unittest")
_COMPILED = "torch._dynamo.eval_frame"
_INNER = ("__wrapped__", "fget", "func")  # what functions, methods, properties and partials wrap
_DEEPEST = 16
# Kernels that somebody put in the place of torch's own; those of autograd would not run in inference mode. (torch has some for CUDA.)
_REPLACED = re.compile(r"aten/.*/(CPU|Autograd\w*)$")


class Unseen:
    """Whether the rows of one call may run in inference mode, asked before each of them.

    Hooks and arguments are looked at every time; the rest of the model once: a call whose caller has code of its own between two rows that may replace a
    part (a callback, a replaced step()) does not ask.
    """

    def __init__(self, denoiser: Callable[..., Any], device: torch.device) -> None:
        self._stock = False
        self._hooks: list[dict[int, Any]] = []
        if isinstance(denoiser, torch.nn.Module) and not _watched(device):
            # Looking at what is foreign may raise anything.
            with suppress(Exception):
                self._stock, self._hooks = is_stock(denoiser), hooks(denoiser.modules())

    def __call__(self, *arguments: Any) -> bool:
        return self._stock and not any(self._hooks) and all(map(_plain, tensors_of(arguments)))


def _watched(device: torch.device) -> bool:
    """Whether something around the call sees each operation, or keeps what it makes."""
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(device.type)
        or getattr(forward_ad, "_current_level", -1) >= 0
        or not all(isinstance(mode, DeviceContext) for mode in modes)
        or any(map(_REPLACED.match, getattr(torch.library, "_impls", ())))
    )


def is_stock(module: torch.nn.Module) -> bool:
    parts = list(module.modules())
    attributes = [value for part in parts for value in vars(part).values()]
    held = [value for value in attributes if callable(value)]
    tensors: list[Any] = [value for value in attributes if isinstance(value, torch.Tensor)]
    for part in parts:
        tensors += [*part._parameters.values(), *part._buffers.values()]
    kinds = {type(value) for value in (*parts, *held)}
    if not all(str(kind.__module__).startswith(_LAYERS) for kind in kinds) or not all(map(_plain, tensors)):
        return False
    if any(type(value).__module__ != _PROCESSORS for value in held):
        return False
    classes = {base for kind in kinds for base in kind.__mro__}
    homes = {sys.modules.get(kind.__module__) for kind in kinds}
    namespaces = [*classes, *homes, F, torch, torch.Tensor]
    return None not in homes and all(
        _own(value) for namespace in namespaces for value in list(vars(namespace).values())
    )


def _own(value: Any) -> bool:
    """Whether what a class or a module holds is no code, or the libraries' own, with all that it wraps."""
    for _ in range(_DEEPEST):
        if value is None or isinstance(value, (type, ModuleType)) or not (callable(value) or hasattr(value, "__get__")):
            return True
        names = getattr(value, "__globals__", None)  # `__module__` would be that of what it wraps
        home = str(type(value).__module__ if names is None else names.get("__name__"))
        if home.partition(".")[0] not in _LIBRARIES or home == _COMPILED:
            return False
        value = next((getattr(value, name) for name in _INNER if getattr(value, name, None) is not None), None)
    return False


def _plain(tensor: Any) -> bool:
    """Subclasses (quantised and sharded weights, a caller's own) run code of their own."""
    return type(tensor) in (torch.nn.Parameter, torch.Tensor, type(None))
