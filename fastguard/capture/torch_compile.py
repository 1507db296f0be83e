"""torch.compile inside our capture, and what must not be there: graphs that torch.compile makes itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._inductor import config as inductor

MODES = (None, "default", "max-autotune-no-cudagraphs")
_SWITCH = "triton.cudagraphs"
_ARGUMENTS = tuple(inspect.signature(torch.compile).parameters)[1:]  # but the model


def check_compile(compile: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of torch.compile, or None for False. ValueError for those that would record graphs themselves."""
    if compile is False:
        return None
    if compile is not True and not isinstance(compile, Mapping):
        raise ValueError(f"compile={compile!r}: must be True, False or a dictionary of torch.compile's arguments")
    options = {} if compile is True else dict(compile)
    if unknown := [name for name in options if name not in _ARGUMENTS]:
        raise ValueError(
            f"compile: {unknown[0]!r} is no argument of torch.compile; allowed are {', '.join(_ARGUMENTS)}"
        )
    mode, switches = options.get("mode"), options.get("options") or {}
    if mode not in MODES:
        allowed = ", ".join(repr(mode) for mode in MODES)
        raise ValueError(
            f"compile: mode={mode!r} would record CUDA graphs of its own; allowed are {allowed} (capture records ours)"
        )
    backend = options.get("backend", "inductor")
    if backend == "inductor":
        switches = {_SWITCH: inductor.triton.cudagraphs, **switches}  # the process's own setting
    if switches.get(_SWITCH) or backend == "cudagraphs":
        raise ValueError(
            f"compile={compile!r}: {_SWITCH} must be off (here, in torch._inductor.config, in TORCHINDUCTOR_CUDAGRAPHS): capture records the graphs"
        )
    return options


def compile_denoiser(denoiser: torch.nn.Module, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """`denoiser` compiled, or itself for None. The module is not changed; its weights, LoRA scales and so on stay its own."""
    if options is None:
        return denoiser
    compiled: Any = torch.compile(denoiser, **options)
    return compiled


def records_graphs(parts: Iterable[torch.nn.Module]) -> str | None:
    """Why a module of these parts is no good inside a capture: one of them was compiled with graphs of its own."""
    for part in parts:
        for config in _compiler_configs(part):
            if config.get(_SWITCH):
                return (
                    f"{type(part).__name__} is compiled with CUDA graphs of its own (reduce-overhead or max-autotune); "
                    f"compile it with one of the modes {', '.join(map(repr, MODES))}"
                )
        if _backend(part) == "cudagraphs":
            return f"{type(part).__name__} is compiled with backend 'cudagraphs'"
    return None


def is_compiled(parts: Iterable[torch.nn.Module]) -> bool:
    """Whether torch.compile is at work in one of these parts."""
    return any(hasattr(form, "get_compiler_config") for part in parts for form in _forms(part))


def _forms(module: torch.nn.Module) -> Iterator[Any]:
    """Where torch.compile(module), module.compile() and `module.forward = torch.compile(module.forward)` leave their work."""
    yield from (module, getattr(module, "_compiled_call_impl", None), vars(module).get("forward"))


def _compiler_configs(module: torch.nn.Module) -> Iterator[Mapping[str, Any]]:
    for compiled in _forms(module):
        ask = getattr(compiled, "get_compiler_config", None)
        config = ask() if ask is not None else None
        if config is not None:
            yield config


def _backend(module: torch.nn.Module) -> str | None:
    """Name of a wrapped module's backend. torch keeps it behind wrappers without a public way in."""
    found: Any = getattr(getattr(module, "dynamo_ctx", None), "callback", None)
    for _ in range(8):
        inner = getattr(found, "_torchdynamo_orig_backend", None)
        if inner is None:
            return getattr(found, "compiler_name", None)
        found = inner
    return None
