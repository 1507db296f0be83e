"""The arguments of a call as tensors at fixed addresses, into which every run's arguments are copied."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map_only

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


class StaticInputs:
    """Copies of all tensors in a tree of tuples, lists and dictionaries, but for those that lie in `resident` storage already.

    `tree` is the same tree over the copies. What is no tensor is baked into whatever is recorded over it, so it belongs to the
    `signature`: trees of equal signature, and only those, may be loaded.
    """

    def __init__(self, tree: Any, device: torch.device, resident: Sequence[torch.Tensor]) -> None:
        self._resident = {_storage(tensor) for tensor in resident}
        self._buffers: list[torch.Tensor] = []

        def fixed(tensor: torch.Tensor) -> torch.Tensor:
            if _storage(tensor) in self._resident:
                return tensor
            # On the loop's device even where the argument is a number in host memory: its value would be baked in.
            self._buffers.append(torch.empty_like(tensor, device=device, requires_grad=False))
            return self._buffers[-1]

        self.tree = tree_map_only(torch.Tensor, fixed, tree)

    @property
    def nbytes(self) -> int:
        return sum(buffer.untyped_storage().nbytes() for buffer in self._buffers)

    def load(self, tree: Any) -> None:
        """Copy everything, changed or not: nobody can tell. Memory that another graph's replay fills (a ControlNet compiled with
        reduce-overhead) has the same address and version with new contents, and so have writes by NumPy and `.data`."""
        leaves = [leaf for leaf in tensors_of(tree) if _storage(leaf) not in self._resident]
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            buffer.copy_(leaf, non_blocking=True)


def signature(tree: Any, resident: Sequence[torch.Tensor]) -> Hashable:
    """All of `tree` but the contents of its tensors; of resident ones also which they are and from where on.

    Not their addresses: what is known of a signature holds for other tensors of the same kind.
    """
    which = {_storage(tensor): number for number, tensor in enumerate(resident)}

    def described(leaf: Any) -> Hashable:
        if not isinstance(leaf, torch.Tensor):
            return type(leaf).__name__, leaf
        number = which.get(_storage(leaf))
        place = None if number is None else (number, leaf.storage_offset())
        return tuple(leaf.shape), leaf.stride(), place, leaf.dtype, str(leaf.device)

    leaves, structure = tree_flatten(tree)
    return repr(structure), tuple(map(described, leaves))


def unhashable(tree: Any) -> str | None:
    """Where `tree` holds something that is neither a tensor nor a plain value, so that nobody can tell whether it changed."""
    for path, leaf in tree_flatten_with_path(tree, is_leaf=_holds_more)[0]:
        if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            return f"arguments{keystr(path)} is a {type(leaf).__name__}"
    return None


def _holds_more(node: Any) -> bool:
    """A named tuple or the like, which may hold more than its items."""
    return isinstance(node, (tuple, list)) and type(node) not in (tuple, list)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested dictionaries, tuples and lists."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
