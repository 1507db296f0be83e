"""The arguments of a call as tensors at fixed addresses, into which every run's arguments are copied."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch


class StaticInputs:
    """Copies of all tensors in a tree of tuples, lists and mappings, but for those that lie in `resident` storage already.

    `tree` is the same tree over the copies. What is no tensor is baked into whatever is recorded over it, so it belongs to the
    `signature`: trees of equal signature, and only those, may be loaded.
    """

    def __init__(self, tree: Any, device: torch.device, resident: Sequence[torch.Tensor]) -> None:
        self._resident = {_storage(tensor) for tensor in resident}
        self._buffers: list[torch.Tensor] = []
        self.tree = self._copy(tree, device)

    @property
    def nbytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers)

    def load(self, tree: Any) -> None:
        """Copy everything, changed or not: nobody can tell. Memory that another graph's replay fills (a ControlNet compiled with
        reduce-overhead) has the same address and version with new contents, and so have writes by NumPy and `.data`."""
        leaves = [leaf for leaf in tensors_of(tree) if _storage(leaf) not in self._resident]
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            buffer.copy_(leaf, non_blocking=True)

    def _copy(self, tree: Any, device: torch.device) -> Any:
        if isinstance(tree, torch.Tensor):
            if _storage(tree) in self._resident:
                return tree
            # On the loop's device even where the argument is a number in host memory: its value would be baked in.
            buffer = torch.empty_like(tree, device=device, requires_grad=False)
            self._buffers.append(buffer)
            return buffer
        if isinstance(tree, Mapping):
            return {key: self._copy(value, device) for key, value in tree.items()}
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._copy(value, device) for value in tree)
        return tree


def signature(tree: Any, resident: Sequence[torch.Tensor]) -> Hashable:
    """All of `tree` but the contents of its tensors; of resident ones also which they are and from where on.

    Not their addresses: what is known of a signature holds for other tensors of the same kind.
    """
    fixed = {_storage(tensor): number for number, tensor in enumerate(resident)}
    return _describe(tree, fixed)


def unhashable(tree: Any, path: str = "arguments") -> str | None:
    """Where `tree` holds something that is neither a tensor nor a plain value, so that nobody can tell whether it changed."""
    if isinstance(tree, Mapping):
        parts = [(f"{path}[{key!r}]", value) for key, value in tree.items()]
    elif type(tree) in (tuple, list):
        parts = [(f"{path}[{i}]", value) for i, value in enumerate(tree)]
    elif tree is None or isinstance(tree, (torch.Tensor, bool, int, float, str, torch.dtype)):
        return None
    else:
        return f"{path} is a {type(tree).__name__}"
    return next((found for where, part in parts if (found := unhashable(part, where))), None)


def _describe(tree: Any, fixed: Mapping[int, int]) -> Hashable:
    if isinstance(tree, torch.Tensor):
        which = fixed.get(_storage(tree))
        place = None if which is None else (which, tree.storage_offset())
        return ("tensor", tuple(tree.shape), tree.stride(), place, tree.dtype, str(tree.device))
    if isinstance(tree, Mapping):
        return ("mapping", tuple((key, _describe(value, fixed)) for key, value in tree.items()))
    if isinstance(tree, (tuple, list)):
        return (type(tree).__name__, tuple(_describe(value, fixed) for value in tree))
    return (type(tree).__name__, tree)


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings, tuples and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (Mapping, tuple, list)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_of(value)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
