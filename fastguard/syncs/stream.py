"""The operations of a denoising loop that wait for the device, or copy from or to it."""

import contextlib
import linecache
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastguard.capture.static_inputs import tensors_of

WAIT, TO_HOST, TO_DEVICE = "synchronisation", "copy to host", "copy to device"

# Lines that are never the cause: of this room, of torch, and of what Python runs around them.
_BESIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent), warnings.__file__, contextlib.__file__, "<")


@dataclass(frozen=True)
class Op:
    """One such operation.

    name      torch's, e.g. "aten.mul.Tensor"
    row       denoiser calls made before it
    denoiser  it is a part of the denoiser, or of a ControlNet
    sync      WAIT, TO_HOST or TO_DEVICE
    blocking  the host waits for it (always for WAIT; for copies unless non_blocking was given)
    where     (file, line) of the innermost Python line outside torch
    """

    name: str
    row: int
    denoiser: bool
    sync: str
    blocking: bool
    where: tuple[str, int]

    @property
    def line(self) -> str:
        """file:line, the file as it is imported: what follows the entry of sys.path under which it lies."""
        file, line = self.where
        entries = sorted((entry.rstrip("/") + "/" for entry in sys.path if entry), key=len, reverse=True)
        return f"{file.removeprefix(next(filter(file.startswith, entries), ''))}:{line}"

    @property
    def code(self) -> str:
        return linecache.getline(*self.where).strip()


@dataclass
class Stream:
    """Collects `Op`s while `open`; `Watching` and `Pretend` show it every operation.

    begun      whether the loop has begun
    broke_off  the exception that ended it
    row        denoiser calls so far
    denoiser   one is running
    """

    ops: list[Op] = field(default_factory=list)
    open: bool = False
    begun: bool = False
    broke_off: str | None = None
    row: int = 0
    denoiser: bool = False

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operation is about to run (in the denoiser it may not return, for it runs on tensors without values)."""
        if self.open and (found := classify(func, args, kwargs)) is not None:
            self.ops.append(Op(str(func), self.row, self.denoiser, *found, innermost_line()))

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """It has run. For those who count more than waits and copies."""

    def enter(self, *_: Any) -> None:
        """The denoiser begins, as a hook is told."""
        self.denoiser = True

    def leave(self, *_: Any, counts: bool = True) -> None:
        self.denoiser = False
        self.row += counts

    def warned(self, where: tuple[str, int]) -> None:
        """torch said that the line synchronised: noted unless an operation of that line has been, since the last denoiser call."""
        if not any(op.where == where and op.row == self.row and op.blocking for op in self.ops):
            self.ops.append(Op("torch.cuda.set_sync_debug_mode", self.row, self.denoiser, WAIT, True, where))


class Watching(TorchDispatchMode):
    """Shows every operation to a stream."""

    watches_only = True  # nothing of what a model computes changes under it: it is no obstacle to a recording

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.stream.before(func, args, kwargs)
        result = self._run(func, args, kwargs)
        self.stream.after(func, args, kwargs, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def classify(func: Any, args: Any, kwargs: Any) -> tuple[str, bool] | None:
    """(kind of synchronisation or copy, whether the host waits) of an operation about to run; None if it is neither."""
    name = func.__name__.split(".")[0]
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        if source.is_cuda == (torch.device(target).type == "cuda"):
            return None
        waits = not (args[2:] and args[2] if name == "copy_" else kwargs.get("non_blocking"))
        return (TO_HOST if source.is_cuda else TO_DEVICE), bool(waits)
    if not any(tensor.is_cuda for tensor in tensors_of((args, kwargs))):
        return None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        if any(index.is_cuda and index.dtype in (torch.bool, torch.uint8) for index in indices):
            return WAIT, True  # a mask is turned into positions
        moves = args[0].is_cuda and any(not index.is_cuda for index in indices)
        return (TO_DEVICE, True) if moves else None
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return None
    shape_or_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    waits = bool(shape_or_value & set(func.tags)) or name in ("_linalg_check_errors", "is_nonzero")
    return (WAIT, True) if waits else None


def innermost_line(*beside: str) -> tuple[str, int]:
    """The innermost Python line that is neither torch's nor of this room nor in a file `beside` them."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*_BESIDE, *beside)):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "?", 0
