"""How a guard runs its denoiser: recorded or not, compiled or not, with whose attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor

from fastguard import checks
from fastguard.capture.attention import check
from fastguard.capture.graphs import MODES, Graphs
from fastguard.capture.obstacles import own_graphs
from fastguard.capture.runner import BodyRunner, Model

COMPILE_MODES = (None, "default", "max-autotune-no-cudagraphs")
_SWITCH = "triton.cudagraphs"
_ARGUMENTS = tuple(inspect.signature(torch.compile).parameters)[1:]  # but the model


@dataclass(frozen=True)
class Options:
    """Checked options. compile: arguments of torch.compile, None for none."""

    capture: str = "auto"
    attention_backend: str | None = None
    compile: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, denoiser: Any, *, capture: str, attention_backend: str | None, compile: Any) -> Options:
        """ValueError names the option that is not allowed, or that cannot work with this denoiser where it is now.

        denoiser: None of a pipeline that was built to encode prompts alone; its call would fail in stock as well.
        """
        checks.choice("capture", capture, MODES)
        options = cls(capture, attention_backend, _compile_arguments(compile))
        if denoiser is None:
            return options
        if capture in ("step", "loop") and (found := own_graphs(denoiser.modules())) is not None:
            raise ValueError(f"capture={capture!r}: {found}")
        if attention_backend is not None:
            some = next(denoiser.parameters(), torch.empty(0))
            dtype = some.dtype if some.is_floating_point() else torch.float16  # quantised weights
            check(attention_backend, some.device, dtype)
        return options

    def lend(self, denoiser: torch.nn.Module, graphs: Graphs) -> BodyRunner:
        """What runs the denoiser and the rows of a call. Calls of a guard follow each other."""
        decides, model = (self.attention_backend, repr(self.compile)), graphs.model
        if model is None or (model.denoiser, model.decides) != (denoiser, decides):
            model = graphs.model = Model(denoiser, self.attention_backend, self.compile)
        return BodyRunner(self.capture, graphs, model)


def _compile_arguments(compile: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of torch.compile, or None for False. ValueError for those that would record graphs themselves."""
    if compile is False:
        return None
    if compile is not True and not isinstance(compile, Mapping):
        raise ValueError(f"compile={compile!r}: must be True, False or a dictionary of torch.compile's arguments")
    given = {} if compile is True else dict(compile)
    for name in given:
        if name not in _ARGUMENTS:
            raise ValueError(f"compile: {name!r} is no argument of torch.compile; allowed are {', '.join(_ARGUMENTS)}")
    if (mode := given.get("mode")) not in COMPILE_MODES:
        allowed = ", ".join(map(repr, COMPILE_MODES))
        raise ValueError(
            f"compile: mode={mode!r} would record CUDA graphs of its own; allowed are {allowed} (capture records ours)"
        )
    backend, switches = given.get("backend", "inductor"), given.get("options") or {}
    own = inductor.triton.cudagraphs if backend == "inductor" else False  # the process's setting
    if switches.get(_SWITCH, own) or backend == "cudagraphs":
        raise ValueError(
            f"compile={compile!r}: {_SWITCH} must be off (here, in torch._inductor.config, in TORCHINDUCTOR_CUDAGRAPHS): capture records the graphs"
        )
    return given
