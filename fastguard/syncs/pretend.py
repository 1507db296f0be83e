"""CUDA tensors on a machine without CUDA, of two kinds, and the mode that runs a program on them.

A `Labelled` tensor holds its values in host memory and calls itself `cuda`: a program that looks at values (`.item()`, `.cpu()`)
runs to its end, so all of its synchronisations can be counted. A fake tensor (`torch._subclasses.FakeTensorMode`) holds no values:
a model of any size costs no memory, and whatever needs a value cannot work by accident. What lives on the host stays real.

Both need nothing of the GPU; fake `cuda` tensors need a torch built with CUDA (the build for CPUs fails at indexing).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda", 0)


class Labelled(torch.Tensor):
    """A tensor that says it is on `DEVICE` while `held` has its values in host memory. Works only inside `Pretend`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Labelled:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """As torch does for tensors of a device: copied to the host first."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: a labelled tensor left the check that made it")


class Pretend(TorchDispatchMode):
    """While entered, `cuda` tensors exist: made from the host's or by factories, labelled if `values`, otherwise fake.

    watch(func, args, kwargs) is called before every operation; whatever it returns is called with the result. Fake tensors made
    elsewhere come in only with their mode, `fake`.
    """

    watches_only = True

    def __init__(
        self,
        watch: Callable[..., Callable[[Any], None]],
        *,
        values: bool,
        fake: FakeTensorMode | None = None,
    ) -> None:
        super().__init__()
        self.values = values
        self._watch = watch
        # Its presence also keeps torch from looking for a driver when somebody names the device.
        self._fake = fake or FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Pretend:
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._fake.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        finish = self._watch(func, args, kwargs)
        result = self._run(func, args, kwargs)
        finish(result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = list(tensors_in((args, kwargs)))
        on_device = names_device(kwargs)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is torch.ops.aten.copy_.default and not isinstance(args[0], FakeTensor):
                return args[0]  # a copy to the host: there is nothing to copy
            return func(*args, **kwargs)
        if on_device and not self.values:
            return func(*args, **kwargs)
        return self._run_on_host(func, args, kwargs, tensors, on_device)

    def _run_on_host(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Any], on_device: bool) -> Any:
        labelled = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Labelled)}
        given = {id(tensor): tensor for tensor in tensors}
        args, kwargs = tree_map_only(Labelled, lambda tensor: tensor.held, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            on_device = on_device or (kwargs["device"] is None and bool(labelled))
            kwargs["device"] = torch.device("cpu")
        else:
            on_device = bool(labelled)
        if func is torch.ops.fastguard.guided_step.default:
            args = (*args[:-1], "torch")
        with unset_fake_temporarily():
            result = func(*args, **kwargs)

        def outward(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in labelled:
                return labelled[id(tensor)]
            if id(tensor) in given or not on_device:
                return tensor
            return Labelled(tensor)

        return tree_map_only(torch.Tensor, outward, result)

    # Moving things onto the device without anybody watching ------------------------------------------------------------

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        if self.values:
            with unset_fake_temporarily():
                return Labelled(tensor.detach())
        return self.fake(tensor)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the same shape, strides and dtype on the device."""
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.holding(values=False), self._fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """The device's own tensor in place of a fake one; where it holds values they are standard normal (integers: 0)."""
        if not self.values:
            return tensor
        with unset_fake_temporarily():
            held = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            return Labelled(held.normal_() if tensor.dtype.is_floating_point else held.zero_())

    def module(self, module: torch.nn.Module) -> Any:
        """A copy of the module whose parameters and buffers are fake tensors on the device; nothing of the original moves."""
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            memo[id(parameter)] = torch.nn.Parameter(self.fake(parameter), requires_grad=False)
        for buffer in module.buffers():
            memo[id(buffer)] = self.fake(buffer)
        return copy.deepcopy(module, memo).eval()

    @contextmanager
    def holding(self, *, values: bool) -> Iterator[None]:
        """Inside, new device tensors are labelled or fake ones as `values` says."""
        before, self.values = self.values, values
        try:
            yield
        finally:
            self.values = before


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)


def names_device(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == DEVICE.type
