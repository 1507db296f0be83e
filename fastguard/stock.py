"""Whether a denoiser is stock: diffusers' and torch's own code alone, over plain tensors, and nobody looks at what it computes.

Such a forward may run in torch's inference mode: the same kernels and bits, without the accounting of views and versions that
makes up a few percent of a small model's forward. Whoever kept a tensor made there could not use it with autograd later. The
models of `fastguard.families` keep none; hooks, foreign layers and processors, patches and compilers might, and run as they do
without a guard, under no_grad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fastguard.capture.ambient import surroundings
from fastguard.capture.obstacles import hooks

# Where the code of these models, their base classes and their decorators lives. No compiler, and no peft: some of its layers cache.
_OWN = ("diffusers.", "torch.nn.", "torch.utils._contextlib", "transformers.", "huggingface_hub.")
_NOT_IN_A_FORWARD = ("__init__", "__setstate__")  # torch.compile puts its own around these, on every module
_FUNCTIONS = (FunctionType, MethodType)


def may_infer(denoiser: Callable[..., Any], device: torch.device) -> bool:
    """Whether the denoiser's next forwards may run in inference mode: it is stock, and nothing around the call looks into it."""
    around = surroundings(device) or _get_current_dispatch_mode_stack() or torch.is_grad_enabled()
    return not around and isinstance(denoiser, torch.nn.Module) and is_stock(denoiser)


def is_stock(module: torch.nn.Module) -> bool:
    parts = list(module.modules())
    held = [value for part in parts for value in vars(part).values() if callable(value)]
    functions = [value for value in held if isinstance(value, _FUNCTIONS)]
    objects = [value for value in (*parts, *held) if not isinstance(value, _FUNCTIONS)]
    classes = {kind for value in objects for kind in type(value).__mro__} - {object}
    methods = [method for kind in classes for method in vars(kind).items() if isinstance(method[1], FunctionType)]
    functions += [value for name, value in methods if name not in _NOT_IN_A_FORWARD]
    own = all(kind.__module__.startswith(_OWN) for kind in classes) and all(map(_own, functions))
    return own and not any(hooks(parts)) and all(map(_plain, _tensors(parts)))


def _own(function: Any) -> bool:
    """Whether its code, and that of all it wraps, is the libraries' own. Its `__module__` would be that of what it wraps."""
    while function is not None:
        plain = getattr(function, "__func__", function)
        if not getattr(plain, "__globals__", {}).get("__name__", "").startswith(_OWN):
            return False
        function = getattr(plain, "__wrapped__", None)
    return True


def _tensors(parts: Iterable[torch.nn.Module]) -> Iterator[Any]:
    for part in parts:
        yield from part._parameters.values()
        yield from part._buffers.values()


def _plain(tensor: Any) -> bool:
    """Subclasses (quantised and sharded weights) run code of their own."""
    return type(tensor) in (torch.nn.Parameter, torch.Tensor, type(None))
