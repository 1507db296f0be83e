"""What a recorded graph of a model cannot notice, as one short key: equal keys mean that a replay computes what the model would.

A weight that is edited in place reaches a graph. What does not: a moved address, every number and choice that Python reads while
the model runs (LoRA scales and active adapters, attention processors and their scalars, FreeU factors, `_attention_backend`,
`training`), and torch's own switches. So the key covers the address of every parameter, buffer and plain tensor, and every plain
value found on the modules and on the objects that they hold (processors, adapters' dictionaries).

Reading all that takes SDXL's UNet a tenth of a second; so it is read once, remembered with the objects that it was read from, and
a call only compares: the same objects in the same places at the same addresses mean the same key.
"""

from __future__ import annotations

import hashlib
import operator
import threading
from collections.abc import Hashable, Iterator
from enum import Enum
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from diffusers.models import attention_dispatch

from fastguard.capture.compiled import records_graphs

# Of torch's own entries on every module only these say what it computes; the other ten are dictionaries of hooks for training.
_TORCH = frozenset(vars(torch.nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
_DEPTH = 4  # processor -> list of scales -> number; deeper objects count by identity
_PLAIN = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, Enum)
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, torch.nn.Module)


# Objects that count by identity, held so that no other object takes their id while a key names it.
_held: dict[int, Any] = {}
_generation = 0
_HELD = 100_000  # somebody puts new objects on a model at every call: begin anew, with keys that match no old one


class Fingerprint:
    """The key of one module, now. Cheap while nothing changed; any thread may ask."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._read()

    def __call__(self) -> Hashable:
        with self._lock:
            if self._changed():
                self._read()
            return self._key, ambient()

    @property
    def obstacle(self) -> str | None:
        """Why the module must not be recorded, as of the last call."""
        return self._obstacle

    def _changed(self) -> bool:
        if self._hooked or any(self._hooks) or self._lengths() != self._counted:
            return True
        return not all(map(operator.is_, self._entries(), self._contents)) or self._where() != self._addresses

    def _lengths(self) -> list[int]:
        return list(map(len, chain(self._mappings, self._sequences)))

    def _entries(self) -> Iterator[Any]:
        """Names, values and items of all that was read. Without a line of Python for each: SDXL's UNet has 48,000 names."""
        return chain(*map(chain.from_iterable, (self._filled, map(dict.values, self._filled), self._sequences)))

    def _where(self) -> list[Hashable]:
        """Addresses and layouts: both may change under the same tensor, as its `.data` does."""
        plain = [*self._tensors, *(part for tensor in self._wrappers for part in parts(tensor))]
        kinds = (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride)
        return [found for of in kinds for found in map(of, plain)]

    def _read(self) -> None:
        self._mappings: list[dict] = []
        self._sequences: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        self._wrappers: list[torch.Tensor] = []
        modules = list(self._module.modules())
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked = any(self._hooks)  # once more, then, to see whether they are gone
        seen: set[int] = {id(module) for module in modules}
        text = repr([_generation, *((kind(m), self._mapping(vars(m), seen, 0)) for m in modules)])
        self._filled = list(filter(None, self._mappings))
        self._contents, self._counted = list(self._entries()), self._lengths()
        self._addresses = self._where()
        digest = hashlib.sha256(text.encode())
        digest.update(repr(self._addresses).encode())
        self._key = digest.hexdigest()
        self._obstacle = obstacle(modules)

    def _mapping(self, mapping: dict, seen: set[int], depth: int) -> list[Any]:
        self._mappings.append(mapping)
        return [
            (str(key), self._describe(value, seen, depth))
            for key, value in mapping.items()
            if depth or key not in _TORCH
        ]

    def _describe(self, value: Any, seen: set[int], depth: int) -> Hashable | list[Any]:
        if isinstance(value, float):
            return float(f"{value:.12g}")  # scaling a LoRA and scaling it back may lose the last digit
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, torch.Tensor):
            wrapper = hasattr(value, "__tensor_flatten__")
            (self._wrappers if wrapper else self._tensors).append(value)
            return (tuple(value.shape), str(value.dtype), kind(value))
        if isinstance(value, _OPAQUE) or depth >= _DEPTH:
            return _identity(value)
        if id(value) in seen:
            return "seen"
        if isinstance(value, dict):
            seen.add(id(value))
            return self._mapping(value, seen, depth + 1)
        if isinstance(value, (list, tuple, set, frozenset)):
            self._sequences.append(value)
            return [kind(value), *(self._describe(item, seen, depth + 1) for item in value)]
        if hasattr(value, "__dict__"):
            seen.add(id(value))
            return [kind(value), self._mapping(vars(value), seen, depth + 1)]
        return _identity(value)


def _identity(value: Any) -> str:
    global _generation
    if isinstance(value, torch.nn.Module):
        return kind(value)  # it is read in its own place
    if isinstance(value, MethodType):  # a new object at every look
        return f"{value.__func__.__qualname__} of {_identity(value.__self__)}"
    if len(_held) > _HELD:
        _held.clear()
        _generation += 1
    _held[id(value)] = value
    return f"{kind(value)} {id(value)}"


def kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of a subclass that holds several tensors (quantised weights)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))


def obstacle(modules: list[torch.nn.Module]) -> str | None:
    """What runs Python in every forward, which a replay would skip: hooks that move weights, count steps, or belong to the user."""
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


def ambient() -> tuple[Any, ...]:
    """Switches outside the model that choose kernels when a graph is recorded."""
    cuda = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.enabled,
        *_precision(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        str(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]),
    )


def _precision() -> tuple[str, ...]:
    """Torch has two generations of these switches; either refuses to be read once the other was set, and old versions have one."""
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    names = (
        "allow_tf32",
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "fp32_precision",
    )
    found = []
    for switches in (backends, matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)):
        for name in names:
            try:
                found.append(str(getattr(switches, name)))
            except (AttributeError, RuntimeError):
                found.append("-")
    return tuple(found)
