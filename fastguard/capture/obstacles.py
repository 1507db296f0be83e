"""What must not be recorded: Python that a replay would skip, conversions and graphs that a graph must not hold."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def surroundings(device: torch.device) -> str | None:
    """What around the call forbids recording: things that change what the model's functions do, and that no key can name."""
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps converted weights, which a graph would outlive"
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    foreign = [m for m in modes if not (isinstance(m, (DeviceContext, FakeTensorMode)) or hasattr(m, "watches_only"))]
    return f"the call runs under a {type(foreign[-1]).__name__}, which a replay would not ask" if foreign else None


def hooks(modules: Iterable[torch.nn.Module]) -> list[dict[int, Any]]:
    """All dictionaries of forward hooks that a forward of these modules looks into, torch's own for every module among them."""
    own = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    return [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks, *own]


def obstacle(modules: Sequence[torch.nn.Module]) -> str | None:
    """Why these modules must not be recorded: hooks that move weights, count steps, or belong to the user; chance; graphs."""
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
    return own_graphs(modules)


def own_graphs(modules: Iterable[torch.nn.Module]) -> str | None:
    """Who of these was compiled with graphs of its own, which cannot be in a capture."""
    for module in modules:
        # Where torch.compile(module), module.compile() and `module.forward = torch.compile(module.forward)` leave their work.
        for form in (module, getattr(module, "_compiled_call_impl", None), vars(module).get("forward")):
            ask = getattr(form, "get_compiler_config", None)
            if ask is not None and (ask() or {}).get("triton.cudagraphs"):
                how = "with CUDA graphs of its own (reduce-overhead or max-autotune)"
                return f"{type(module).__name__} is compiled {how}"
    return None
