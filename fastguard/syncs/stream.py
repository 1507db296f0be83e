"""The operations of a denoising loop as torch sees them: what waits, what copies between host and device, what launches a kernel."""

from __future__ import annotations

import contextlib
import linecache
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard.syncs.pretend import tensors_in

WAIT, TO_HOST, TO_DEVICE = "synchronisation", "copy to host", "copy to device"

_OURS = ("stream.py", "pretend.py", "probe.py", "find.py")
_NOT_A_CAUSE = (
    *(str(Path(__file__).with_name(name)) for name in _OURS),
    *(str(Path(torch.__file__).parent), warnings.__file__, contextlib.__file__, "<"),
)
_MEMORY_ONLY = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "lift_fresh", "alias", "_unsafe_view", "_reshape_alias", "set_", "resize_"),
}
_NOT_READ = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}  # what they change they do not read


@dataclass(frozen=True)
class Op:
    """One operation that involves the device.

    name      torch's, e.g. "aten.mul.Tensor"
    row       denoiser calls made before it
    denoiser  it is a part of the denoiser
    sync      WAIT, TO_HOST, TO_DEVICE or None
    blocking  the host waits for it (always for WAIT; for copies unless non_blocking was given)
    launch    it launches a kernel: neither a view, nor an allocation, nor a copy between host and device
    moved     bytes of device memory read and written, each tensor once; 0 if not a launch
    where     (file, line) of the innermost Python line outside torch
    tensors   the device tensors among its arguments and results, as "float16[2, 4, 64, 64]"
    """

    name: str
    row: int
    denoiser: bool
    sync: str | None
    blocking: bool
    launch: bool
    moved: int
    where: tuple[str, int]
    tensors: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """file:line, the file as it is imported."""
        return f"{short_path(self.where[0])}:{self.where[1]}"

    @property
    def code(self) -> str:
        return linecache.getline(*self.where).strip()


@dataclass
class Stream:
    """Collects `Op`s while `open`; `Pretend` and `Real` call it for every operation.

    started, finished  whether the loop has begun, and whether it has ended without an exception
    row                denoiser calls so far
    denoiser           one is running
    """

    ops: list[Op] = field(default_factory=list)
    open: bool = False
    started: bool = False
    finished: bool = False
    row: int = 0
    denoiser: bool = False

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Callable[[Any], None]:
        if not self.open:
            return _nothing
        given = list(tensors_in((args, kwargs)))
        sync, blocking = classify(func, args, kwargs, given)
        place = len(self.ops)
        if sync is not None:  # noted first: on fake tensors the operation may not return
            self.ops.append(self._op(func, sync, blocking, False, 0, given))

        def finish(result: Any) -> None:
            results = list(tensors_in(result))
            if sync in (TO_HOST, TO_DEVICE) or not any(t.is_cuda for t in (*given, *results)):
                return
            if not _launches(func, results):
                return
            moved = traffic(func, args, kwargs, results)
            op = self._op(func, sync, blocking, True, moved, [*given, *results])
            self.ops[place:] = [op]

        return finish

    def _op(self, func: Any, sync: str | None, blocking: bool, launch: bool, moved: int, tensors: list) -> Op:
        names = tuple(dict.fromkeys(_name(t) for t in tensors if t.is_cuda))
        where = innermost_line()
        return Op(str(func), self.row, self.denoiser, sync, blocking, launch, moved, where, names)

    @contextlib.contextmanager
    def in_denoiser(self) -> Iterator[None]:
        self.denoiser = True
        try:
            yield
        finally:
            self.denoiser = False
            self.row += 1

    def warned(self, where: tuple[str, int]) -> None:
        """torch said that the line synchronised: noted unless an operation of that line has been, since the last denoiser call."""
        if not any(op.where == where and op.row == self.row and op.blocking for op in self.ops):
            name = "torch.cuda.set_sync_debug_mode"
            self.ops.append(Op(name, self.row, self.denoiser, WAIT, True, False, 0, where))

    def forget(self) -> None:
        """Back to the beginning."""
        self.ops.clear()
        self.open = self.started = self.finished = self.denoiser = False
        self.row = 0


class Real(TorchDispatchMode):
    """Runs every operation as it is, and shows it to `watch` (see `Pretend`)."""

    watches_only = True

    def __init__(self, watch: Callable[..., Callable[[Any], None]]) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        finish = self._watch(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        finish(result)
        return result


def _nothing(result: Any) -> None:
    pass


def classify(func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> tuple[str | None, bool]:
    """(kind of synchronisation or copy, whether the host waits) of an operation about to run."""
    name = func.__name__.split(".")[0]
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        if source.is_cuda == (torch.device(target).type == "cuda"):
            return None, False
        waits = not (args[2:] and args[2] if name == "copy_" else kwargs.get("non_blocking"))
        return (TO_HOST if source.is_cuda else TO_DEVICE), bool(waits)
    if not any(tensor.is_cuda for tensor in tensors):
        return None, False
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if any(index.is_cuda and index.dtype in (torch.bool, torch.uint8) for index in indices):
            return WAIT, True  # a mask is turned into positions
        moves = args[0].is_cuda and any(not index.is_cuda for index in indices)
        return (TO_DEVICE, True) if moves else (None, False)
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return None, False
    shape_or_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    waits = bool(shape_or_value & set(func.tags)) or name in ("_linalg_check_errors", "is_nonzero")
    return (WAIT, True) if waits else (None, False)


def _launches(func: Any, results: list[torch.Tensor]) -> bool:
    name = func.__name__.split(".")[0]
    if func.is_view or name in _MEMORY_ONLY or name == "_local_scalar_dense":
        return False
    return bool(results) or func._schema.is_mutable


def traffic(func: Any, args: Any, kwargs: Any, results: list[torch.Tensor]) -> int:
    """Bytes of device memory that the operation's arguments and results occupy: what it reads and writes at least."""
    name = func.__name__.split(".")[0]
    read: dict[int, torch.Tensor] = {}
    written: dict[int, torch.Tensor] = {id(t): t for t in results}
    for argument, value in _named(func, args, kwargs):
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_in(value):
            if mutated:
                written[id(tensor)] = tensor
            if not mutated or name not in _NOT_READ:
                read[id(tensor)] = tensor
    return sum(_bytes(t) for t in (*read.values(), *written.values()) if t.is_cuda)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _bytes(tensor: torch.Tensor) -> int:
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * tensor.element_size()


def _name(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def innermost_line() -> tuple[str, int]:
    """The innermost Python line that is neither torch's nor the recorder's own."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_NOT_A_CAUSE):
            return file, frame.f_lineno
        frame = frame.f_back
    return "?", 0


def short_path(file: str) -> str:
    """The file as it is imported: what follows the entry of sys.path under which it lies."""
    for entry in sorted((e for e in sys.path if e), key=len, reverse=True):
        if file.startswith(entry.rstrip("/") + "/"):
            return file[len(entry.rstrip("/")) + 1 :]
    return file
