"""How a guard runs its denoiser: recorded or not, compiled or not, with whose attention."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastguard.capture.attention import Attending, check, find, head_sizes
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.graphs import MODES, Graphs
from fastguard.capture.runner import Capturing
from fastguard.capture.torch_compile import check_compile, compile_denoiser, records_graphs


@dataclass(frozen=True)
class Options:
    """Checked options. compile: arguments of torch.compile, None for none."""

    capture: str = "auto"
    attention_backend: str | None = None
    compile: Mapping[str, Any] | None = None
    _last: _Last = field(default_factory=lambda: _Last(), repr=False, compare=False)

    @classmethod
    def of(
        cls,
        denoiser: torch.nn.Module | None,
        *,
        capture: str,
        attention_backend: str | None,
        compile: bool | Mapping[str, Any],
    ) -> Options:
        """ValueError names the option that is not allowed, or that cannot work with this denoiser where it is now."""
        if capture not in MODES:
            raise ValueError(f"capture={capture!r}: allowed are {', '.join(map(repr, MODES))}")
        if denoiser is None:  # a pipeline that was built to encode prompts alone; its call would fail in stock as well
            return cls(capture, attention_backend, check_compile(compile))
        arguments = check_compile(compile)
        if arguments is not None and not isinstance(denoiser, torch.nn.Module):
            raise ValueError(f"compile={compile!r}: {type(denoiser).__name__} is no torch module")
        if capture in ("step", "loop") and (found := records_graphs(denoiser.modules())) is not None:
            raise ValueError(f"capture={capture!r}: {found}")
        if attention_backend is not None:
            find(attention_backend)
            some = next(denoiser.parameters(), torch.empty(0))
            dtype = some.dtype if some.is_floating_point() else torch.float16  # quantised weights
            check(attention_backend, some.device, dtype, head_sizes(denoiser))
        return cls(capture, attention_backend, arguments)

    def lend(self, denoiser: torch.nn.Module, graphs: Graphs) -> tuple[Callable[..., Any], Capturing]:
        """The denoiser as a call shall run it, and what a call needs to record it."""
        graphs.go_with(self._last)
        ready = self._last.of(denoiser, self)
        options = (self.attention_backend, repr(self.compile))
        capturing = Capturing(self.capture, graphs, ready.fingerprint, options, begun=graphs.clears, moves=ready.moves)
        return ready.attending.in_a_call(), capturing


class _Last:
    """The denoiser that was lent last, ready to run: mostly there is only one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: _Ready | None = None

    def of(self, denoiser: torch.nn.Module, options: Options) -> _Ready:
        with self._lock:
            if self._ready is None or self._ready.denoiser is not denoiser:
                self._ready = _Ready(denoiser, options)
            return self._ready

    def let_go(self) -> None:
        with self._lock:
            self._ready = None


class _Ready:
    """One denoiser, how it runs, and its fingerprint. A call keeps its own, whatever another call lends meanwhile."""

    def __init__(self, denoiser: torch.nn.Module, options: Options) -> None:
        self.denoiser = denoiser
        self.attending = Attending(options.attention_backend, denoiser, compile_denoiser(denoiser, options.compile))
        self.moves: dict[Hashable, int] = {}
        self._lock = threading.Lock()
        self._fingerprint: Fingerprint | None = None

    def fingerprint(self) -> Fingerprint:
        with self._lock:
            if self._fingerprint is None:
                self._fingerprint = Fingerprint(self.denoiser)
            return self._fingerprint
