"""What a recorded graph of a model cannot notice, as one short key: equal keys mean that a replay computes what the model would.

A weight that is edited in place reaches a graph. What does not: a moved address, every number and choice that Python reads while
the model runs (LoRA scales and active adapters, attention processors and their scalars, FreeU factors, `_attention_backend`,
`training`), and torch's own switches. So the key covers the address of every parameter, buffer and plain tensor, and every plain
value on the modules, on the objects that they hold (processors, adapters' dictionaries, modules outside the tree) and on the
classes of all these. What a function has in its closure or reads from its module is not looked at.

Reading all that takes SDXL's UNet some tenths of a second; so it is read once, remembered with the objects that it was read from,
and a call only compares: the same objects in the same places at the same addresses mean the same key.
"""

import hashlib
import operator
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain, starmap
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import numpy as np
import torch

from fastguard.capture.obstacles import hooks, obstacle
from fastguard.capture.switches import ambient

# Of torch's own entries on every module only these say what it computes; the other ten are dictionaries of hooks for training.
_TORCH = frozenset(vars(torch.nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
_DEPTH = 4  # processor -> list of scales -> number; deeper objects count by identity
_PLAIN = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, Enum, np.generic)
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType)
_COMPILERS = ("torch._dynamo.", "torch._inductor.")  # their objects count their own runs
_SEQUENCES = (list, tuple, set, frozenset, deque)


@dataclass(frozen=True)
class Key:
    """`digest` names functions and the like by their address. Held with it, so that no other object takes it while the key is used."""

    digest: str
    held: tuple[Any, ...] = field(compare=False, repr=False)


class Fingerprint:
    """The key of one module, now, and why the module must not be recorded (`obstacle`). Cheap while nothing changed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._read()

    def __call__(self) -> Hashable:
        same = not (self._hooked or any(self._hooks)) and self._lengths() == self._counted
        if not (same and all(map(operator.is_, self._entries(), self._contents)) and self._where() == self._addresses):
            self._read()
        return self._key, ambient()

    def written(self) -> dict[torch.Tensor, int]:
        """All tensors as of the last call, and how often each was written to; those made in inference mode do not count that."""
        return {tensor: 0 if tensor.is_inference() else tensor._version for tensor in self._plain()}

    def _lengths(self) -> list[int]:
        return list(map(len, chain(self._mappings, self._sequences)))

    def _entries(self) -> Iterator[Any]:
        """Names, values and items of all that was read. Without a line of Python for each: SDXL's UNet has 48,000 names."""
        values = map(operator.methodcaller("values"), self._mappings)
        slots = starmap(getattr, self._slots)
        return chain(slots, *map(chain.from_iterable, (self._mappings, values, self._sequences)))

    def _where(self) -> list[Hashable]:
        """Addresses and layouts: both may change under the same tensor, as its `.data` does. Arrays are small: their contents."""
        plain = self._plain()
        kinds = (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride, operator.attrgetter("dtype"))
        return [*(found for of in kinds for found in map(of, plain)), *(array.tobytes() for array in self._arrays)]

    def _plain(self) -> list[torch.Tensor]:
        return [*self._tensors, *chain.from_iterable(map(parts, self._wrappers))]

    def _read(self) -> None:
        self._mappings: list[Mapping] = []
        self._sequences: list[Any] = []
        self._slots: list[tuple[Any, str, None]] = []
        self._arrays: list[np.ndarray] = []
        self._tensors: list[torch.Tensor] = []
        self._wrappers: list[torch.Tensor] = []
        self._modules: list[torch.nn.Module] = []
        self._held: list[Any] = []
        self._numbers: dict[int, int] = {}
        # What is still to be opened, with the depth of what lies in it. It grows while it is read, the nearest first.
        self._queue: list[tuple[Any, int]] = []
        self._refer(self._module, 0)
        text = repr([self._open(value, depth) for value, depth in self._queue])
        self._queue = []
        self._hooks = hooks(self._modules)
        self._hooked = any(self._hooks)  # once more, then, to see whether they are gone
        self._contents, self._counted, self._addresses = list(self._entries()), self._lengths(), self._where()
        digest = hashlib.sha256(f"{text}{self._addresses}".encode()).hexdigest()
        self._key = Key(digest, tuple(self._held))
        self.obstacle = obstacle(self._modules)

    def _describe(self, value: Any, depth: int) -> Hashable | list[Any]:
        if isinstance(value, float):
            return float(f"{value:.12g}")  # scaling a LoRA and scaling it back may lose the last digit
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, depth)
        if isinstance(value, np.ndarray):
            self._arrays.append(value)
            return (value.shape, str(value.dtype), kind(value))
        if isinstance(value, torch.nn.Module):
            return self._refer(value, 0)
        if isinstance(value, _OPAQUE) or depth >= _DEPTH or kind(value).startswith(_COMPILERS):
            return self._identity(value)
        return self._refer(value, depth + 1)

    def _tensor(self, tensor: torch.Tensor, depth: int) -> list[Any]:
        """Its layout, and what is noted on it: quantisers say there what a weight is, compilers what is theirs."""
        flatten = getattr(tensor, "__tensor_flatten__", None)
        (self._tensors if flatten is None else self._wrappers).append(tensor)
        inner, context = ((), None) if flatten is None else flatten()
        found: list[Any] = [tuple(tensor.shape), str(tensor.dtype), kind(tensor)]
        if depth < _DEPTH:
            noted = [name for name in vars(tensor) if not name.startswith("_dynamo") and name not in inner]
            found += [self._mapping(vars(tensor), depth + 1, noted), self._describe(context, depth + 1)]
        return found

    def _refer(self, value: Any, depth: int) -> str:
        """A number for what is read in its own place."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._numbers)
            self._queue.append((value, depth))
        return f"{kind(value)} #{self._numbers[id(value)]}"

    def _open(self, value: Any, depth: int) -> Hashable | list[Any]:
        if isinstance(value, torch.nn.Module):
            self._modules.append(value)
            return [self._classes(value), self._mapping(vars(value), depth)]
        if isinstance(value, type):
            names = [name for name in vars(value) if not name.startswith("__") or name == "__call__"]
            return self._mapping(vars(value), depth, names)
        if isinstance(value, dict):
            return self._mapping(value, depth)
        if isinstance(value, _SEQUENCES):
            self._sequences.append(value)
            return [self._describe(item, depth) for item in value]
        return self._object(value, depth)

    def _mapping(self, mapping: Mapping, depth: int, names: list[str] | None = None) -> list[Any]:
        self._mappings.append(mapping)
        names = names if names is not None else [key for key in mapping if depth or key not in _TORCH]
        return [(str(key), self._describe(mapping[key], depth)) for key in names]

    def _object(self, value: Any, depth: int) -> Hashable | list[Any]:
        found = self._slotted(value, depth)
        if hasattr(value, "__dict__"):
            found = [*found, self._mapping(vars(value), depth)]
        return [self._classes(value), *found] if found else self._identity(value)

    def _slotted(self, value: Any, depth: int) -> list[Any]:
        """What lies in slots: a class's own, the function and object of a method, the parts of functools.partial."""
        entries = chain.from_iterable(vars(cls).items() for cls in type(value).__mro__)
        names = [name for name, entry in entries if isinstance(entry, MemberDescriptorType)]
        self._slots += [(value, name, None) for name in names]
        return [(name, self._describe(getattr(value, name, None), depth)) for name in names]

    def _classes(self, value: Any) -> list[str]:
        """Values and functions on the classes; what these hold, one step deep."""
        return [self._refer(cls, _DEPTH - 1) for cls in type(value).__mro__ if cls.__module__ != "builtins"]

    def _identity(self, value: Any) -> str:
        self._held.append(value)
        return f"{kind(value)} {id(value)}"


def kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor, or of a subclass that holds several tensors (quantised weights) these."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]
