"""The latents between two steps, as the pipeline's variable `latents` holds them: nothing is computed until somebody looks.

A pipeline does one thing with them, `torch.cat([latents] * 2)`, whose result the fused op has written already, scaled and in the
model's dtype. So that costs no kernel. Any other use (an interrupted loop that decodes them, say) sees the real latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_METADATA = {
    *(torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__),  # type: ignore[attr-defined]
    *(torch.Tensor.ndim.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.requires_grad.__get__),  # type: ignore[attr-defined]
    *(torch.Tensor.size, torch.Tensor.stride, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.__len__),
}

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = {"__setitem__", "__set__", *(f"__i{name}__" for name in _OPERATORS)}


class Pending(torch.Tensor):
    """A tensor of known shape, dtype and device whose values `look()` gives.

    It stands for what look() returns at the time of the use, and refuses to be changed in place.
    """

    look: Callable[[], torch.Tensor]
    times: dict[int, Pending]  # torch.cat of itself, by how often

    @staticmethod
    def __new__(
        cls,
        look: Callable[[], torch.Tensor],
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pending:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), strides=strides, dtype=dtype, device=device
        )
        tensor.look, tensor.times = look, {}
        return tensor

    def repeated(self, count: int) -> Pending:
        """torch.cat([self] * count), pending too."""
        if count not in self.times:
            self.times[count] = Pending(
                lambda: torch.cat([self.look()] * count),
                (count * len(self), *self.shape[1:]),
                self.stride(),
                self.dtype,
                self.device,
            )
        return self.times[count]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.cat and not kwargs and len(args) == 1:
            first = args[0][0]
            if isinstance(first, Pending) and all(tensor is first for tensor in args[0]):
                return first.repeated(len(args[0]))
        if _changes(func, args):
            raise RuntimeError(
                f"{func.__name__}: the latents between two steps cannot be changed in place; clone them first"
            )
        args, kwargs = values_of((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = values_of((args, kwargs or {}))
        return func(*args, **kwargs)


def values_of(tree: Any) -> Any:
    """The tree with real tensors in place of pending ones."""
    return tree_map_only(Pending, lambda tensor: tensor.look(), tree)


def settled(output: Any) -> Any:
    """A pipeline's output with real latents, where it returns those of an interrupted loop."""
    if isinstance(output, tuple):
        return tuple(values_of(item) for item in output)
    if isinstance(output, dict):  # diffusers' outputs are dicts that are attributes, too
        for name, value in list(output.items()):
            output[name] = values_of(value)
    return output


def _changes(func: Any, args: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place and bool(args) and isinstance(args[0], Pending)
