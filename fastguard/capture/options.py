"""How a guard runs its denoiser: recorded or not, compiled or not, with whose attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastguard.capture.attention import Attending, check, find, head_sizes
from fastguard.capture.graphs import MODES, Graphs
from fastguard.capture.runner import BodyRunner, Model
from fastguard.capture.torch_compile import check_compile, compile_denoiser, records_graphs


@dataclass(frozen=True)
class Options:
    """Checked options. compile: arguments of torch.compile, None for none."""

    capture: str = "auto"
    attention_backend: str | None = None
    compile: Mapping[str, Any] | None = None

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

    def lend(self, denoiser: torch.nn.Module, graphs: Graphs) -> tuple[Callable[..., Any], BodyRunner]:
        """The denoiser as a call shall run it, and what runs the call's rows. Calls of a guard follow each other."""
        decides = (self.attention_backend, repr(self.compile))
        if graphs.model is None or (graphs.model.denoiser, graphs.model.decides) != (denoiser, decides):
            runs = Attending(self.attention_backend, denoiser, compile_denoiser(denoiser, self.compile))
            graphs.model = Model(denoiser, decides, runs)
        model = graphs.model
        return model.runs.in_a_call(), BodyRunner(self.capture, graphs, model)
