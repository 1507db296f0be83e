"""CUDA tensors on a machine without CUDA, and the mode that runs a program on them.

A `Labelled` tensor holds its values in host memory and calls itself `cuda`. Whoever looks at them (`.item()`, `.cpu()`, `if x > 0`) asks
torch for an operation, which the stream sees, and gets them, so that a loop that looks at values runs to its end and all of its waits
are found. A denoiser runs on fake tensors (`torch._subclasses.FakeTensorMode`), which hold none: a model of any size costs no memory.
What lives on the host stays real. Fake `cuda` tensors need a torch built with CUDA (the build for CPUs fails at indexing).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes as nobody_watching
from torch.utils._pytree import tree_map_only

from fastguard.capture.static_inputs import tensors_of
from fastguard.syncs.stream import Stream, Watching

DEVICE = torch.device("cuda", 0)


class Labelled(torch.Tensor):
    """A tensor that says it is on `DEVICE` while `held` has its values in host memory. Works only inside `Pretend`."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Labelled:
        layout: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, dtype=held.dtype, device=DEVICE)
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """As torch does for tensors of a device: copied to the host first."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: a labelled tensor left the check that made it")


class Pretend(Watching):
    """While entered, `cuda` tensors exist, labelled ones: made from the host's or by factories; in the denoiser fake ones."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        # Its presence also keeps torch from looking for a driver when somebody names the device.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Pretend:
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._fake.__exit__(*exception)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = {id(tensor): tensor for tensor in tensors_of((args, kwargs))}
        labelled = {id(tensor.held): tensor for tensor in given.values() if isinstance(tensor, Labelled)}
        device = kwargs.get("device")
        on_device = bool(labelled) if device is None else torch.device(device).type == DEVICE.type
        made_in_denoiser = on_device and not labelled and self.stream.denoiser
        if made_in_denoiser or any(isinstance(tensor, FakeTensor) for tensor in given.values()):
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Labelled, lambda tensor: tensor.held, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if func is torch.ops.fastguard.guided_step.default:
            args = (*args[:-1], "torch")
        with unset_fake_temporarily():
            result = func(*args, **kwargs)

        def outward(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in labelled:
                return labelled[id(tensor)]
            return tensor if id(tensor) in given or not on_device else Labelled(tensor)

        return tree_map_only(torch.Tensor, outward, result)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the same shape, strides and dtype."""
        with nobody_watching(), self._fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    def drawn(self, fake: torch.Tensor) -> torch.Tensor:
        """A labelled tensor like a fake one, standard normal (integers: 0)."""
        with nobody_watching():
            held = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype)
            return Labelled(held.normal_() if fake.dtype.is_floating_point else held.zero_())

    def module(self, module: torch.nn.Module) -> Any:
        """A copy of the module whose parameters and buffers are fake; nothing of the original moves."""
        memo: dict[int, Any] = {id(buffer): self.fake(buffer) for buffer in module.buffers()}
        memo |= {id(p): torch.nn.Parameter(self.fake(p), requires_grad=False) for p in module.parameters()}
        return copy.deepcopy(module, memo).eval()
