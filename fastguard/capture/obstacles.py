"""What runs Python in every forward, which a replay would skip: hooks that move weights, count steps, or belong to the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from fastguard.capture.torch_compile import records_graphs


def hooks(modules: Iterable[torch.nn.Module]) -> list[dict[int, Any]]:
    """All dictionaries of forward hooks that a forward of these modules looks into, torch's own for every module among them."""
    own = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks, *own]


def watched(part: Any) -> bool:
    """Whether forward hooks see what goes into a part of a pipeline, or into something in it."""
    return any(hooks(part.modules() if isinstance(part, torch.nn.Module) else ()))


def obstacle(modules: Sequence[torch.nn.Module]) -> str | None:
    """Why these modules must not be recorded."""
    if any(hooks(())):
        return "a forward hook for every module (torch.nn.modules.module) runs Python in every forward"
    for module in modules:
        where = type(module).__name__
        if (registry := getattr(module, "_diffusers_hook", None)) is not None:
            names = ", ".join(registry.hooks) or "a hook"
            return f"{names} on {where} runs Python in every forward (group offload, caching, casting)"
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            return f"{type(hook).__name__} of accelerate on {where} runs Python in every forward (offload)"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a forward hook on {where} runs Python in every forward"
        if module.training and isinstance(module, torch.nn.Dropout) and module.p > 0:
            return "a Dropout is in training mode; call eval() on the model"
    return records_graphs(modules)
