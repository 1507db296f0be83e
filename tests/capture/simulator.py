"""CUDA graphs without CUDA: the ops of a body are recorded with the tensors that they touched, and run again on those.

What a CUDA graph does not do, this does not do either: recording executes nothing (whatever was written is put back), a replay
runs no Python of the body, reads numbers as they were when recorded and tensors where they were when recorded, and what lies in
the graph's own memory is worthless outside it: it holds NaN between replays. What a capture forbids raises, as it does on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map_only

from fastguard.capture import graphs

aten = torch.ops.aten
RANDOM = ("rand", "normal", "bernoulli", "native_dropout", "exponential", "uniform")


class Node(NamedTuple):
    func: Any
    args: tuple
    kwargs: dict
    outputs: list[torch.Tensor]  # to be written by a replay; empty for views and in-place ops


class Tape(TorchDispatchMode):
    """A recorded body."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.made: dict[int, torch.Tensor] = {}  # storage -> a tensor that spans it: the graph's own memory
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch.compile made runs in here as it does in a capture; under other modes it steps aside for the eager model."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tags = getattr(func, "tags", ())
        sync = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        # A number may stay on the host, where CUDA bakes it into the launch; an array would have to be copied to the device.
        from_host = func is aten.lift_fresh.default and args[0].dim() > 0
        if sync or name.startswith(RANDOM) or from_host:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        # An alias keeps the address when the tensor is given another one (`parameter.data = ...`).
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        given = {_storage(t) for t in _tensors((args, kwargs))}
        if func._schema.is_mutable:
            self._save(func, args, kwargs)
        result = func(*args, **kwargs)
        leaves, _ = tree_flatten(result)
        on_host = any(not isinstance(leaf, (torch.Tensor, type(None))) for leaf in leaves)
        if on_host and not name.startswith("_scaled_dot_product"):  # these also return sizes and seeds
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        fresh = [t for t in leaves if isinstance(t, torch.Tensor) and _storage(t) not in given]
        for tensor in fresh:
            self.made[_storage(tensor)] = tensor.detach()
        if func._schema.is_mutable or fresh:
            outputs = [] if func._schema.is_mutable else [t.detach() for t in fresh]
            self.nodes.append(Node(func, args, kwargs, outputs))
        return result

    def _save(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Remember what a write is about to change, unless the body itself made it."""
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                key = _storage(tensor)
                if key not in self.made and key not in self._before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self._before[key] = whole, whole.clone()

    def finish(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)
        self.poison()

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.nodes:
            result, _ = tree_flatten(func(*args, **kwargs))
            for old, new in zip(outputs, [t for t in result if isinstance(t, torch.Tensor)], strict=False):
                old.copy_(new)
        self.poison()

    def poison(self) -> None:
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.made.values())


def is_recording() -> bool:
    """Whether the caller runs in a body that is being recorded."""
    return any(isinstance(mode, Tape) for mode in _get_current_dispatch_mode_stack())


class Recorder:
    """In the place of `cuda_graphs.Recorder`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tapes: list[Tape] = []
        self.recorded = 0
        self.highest = 0  # most bytes of the pool at any time

    def record(self, body: Callable, warm_up: Callable, keeps: Sequence[torch.Tensor]) -> Tape:
        saved = [tensor.clone() for tensor in keeps]
        try:
            warm_up()
        finally:
            for tensor, copy in zip(keeps, saved, strict=True):
                tensor.copy_(copy)
        tape = Tape()
        try:
            with tape:
                body()
        finally:
            tape.finish()
        self.tapes.append(tape)
        self.recorded += 1
        self.highest = max(self.highest, self.pool_bytes())
        return tape

    def replay(self, tape: Tape) -> None:
        assert tape in self.tapes, "replay of a graph that was released"
        tape.replay()

    def release(self, tape: Tape) -> None:
        self.tapes.remove(tape)
        tape.nodes.clear()

    def join(self, tensors: Iterable[torch.Tensor] = ()) -> None: ...
    def new_pool(self) -> None: ...

    def pool_bytes(self) -> int:
        return sum(tape.nbytes for tape in self.tapes)


@contextlib.contextmanager
def recording() -> Iterator[list[Recorder]]:
    """Inside, tensors on the CPU are recorded; gives the recorders that were made."""
    made: list[Recorder] = []

    def make(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    graphs.RECORDERS["cpu"] = make
    try:
        yield made
    finally:
        del graphs.RECORDERS["cpu"]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
