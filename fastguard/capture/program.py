"""What is recorded, by whom, over whose tensors: the nouns of `fastguard.capture.graphs`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Body = Callable[[], None]


class Recorder(Protocol):
    """What records on a device: `cuda_graphs.Recorder`, or the simulator of the tests. It has locks of its own, and calls nobody's."""

    def record(self, body: Body, warm_up: Body, keeps: Sequence[torch.Tensor]) -> Any: ...
    def replay(self, graph: Any) -> None: ...
    def release(self, graph: Any) -> None: ...
    def join(self, tensors: Iterable[torch.Tensor] = ()) -> None: ...
    def pool_bytes(self) -> int: ...
    def new_pool(self) -> None: ...


@dataclass(eq=False)
class Workspace:
    """content: has `tensors`, those of them that a body changes in `changed`, and `nbytes`."""

    key: Hashable
    content: Any
    recorder: Recorder
    leased: bool = True
    graphs: int = 0
    cleared: bool = False  # since it was leased: nothing is recorded over it any more


@dataclass(eq=False)
class Program:
    """A body and the tensors it works on beside the workspace's.

    inputs   whatever the caller loads before a run
    keeps    tensors that the body changes and that a run of `warm_up` must leave as they were
    warm_up  shows the device everything that the body uses; the body itself unless given
    watch    called before the body runs for the first time; what it gives says afterwards why a replay would not do the same
    nbytes   of the inputs
    """

    body: Body
    inputs: Any = None
    keeps: Sequence[torch.Tensor] = ()
    warm_up: Body | None = None
    watch: Callable[[], Callable[[], str | None]] = lambda: lambda: None
    nbytes: int = 0


def name(key: Hashable) -> str:
    """A short name of a key, for people."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:12]


def first_error(error: BaseException) -> BaseException:
    """The error that began it: ending a capture that the body broke raises an error of its own over it."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def error_text(error: BaseException) -> str:
    """An error in a line, with the one that began it."""
    first = first_error(error)
    said = [f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}" for e in (first, error)]
    return said[0] if first is error else f"{said[0]} (then {said[1]})"
