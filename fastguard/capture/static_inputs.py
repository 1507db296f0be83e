"""The arguments of a call as tensors at fixed addresses, into which every run's arguments are copied."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only

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
        self.nbytes = sum(buffer.untyped_storage().nbytes() for buffer in self._buffers)

    def load(self, tree: Any) -> None:
        """Copy everything, changed or not: nobody can tell. Memory that another graph's replay fills (a ControlNet compiled with
        reduce-overhead) has the same address and version with new contents, and so have writes by NumPy and `.data`."""
        leaves = [leaf for leaf in tensors_of(tree) if _storage(leaf) not in self._resident]
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            buffer.copy_(leaf, non_blocking=True)


def signature(tree: Any, resident: Sequence[torch.Tensor]) -> Hashable:
    """All of `tree` but the contents of its tensors; of resident ones also which they are and from where on.

    Not their addresses: what is known of a signature holds for other tensors of the same kind. ValueError where the tree holds
    something that is neither a tensor nor a plain value.
    """
    which = {_storage(tensor): number for number, tensor in enumerate(resident)}
    # What may hold more than its items, as a named tuple, counts as one thing.
    leaves, structure = tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, (tuple, list)) and type(node) not in (tuple, list)
    )
    found: list[Hashable] = [repr(structure)]
    for path, leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            number = which.get(_storage(leaf))
            place = None if number is None else (number, leaf.storage_offset())
            found.append((tuple(leaf.shape), leaf.stride(), place, leaf.dtype, str(leaf.device)))
        elif isinstance(leaf, _PLAIN):
            found.append((type(leaf).__name__, leaf))
        else:
            where = f"arguments{keystr(path)} is a {type(leaf).__name__}"
            raise ValueError(f"{where}: nobody can tell whether it changes")
    return tuple(found)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors in nested dictionaries, tuples and lists."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
