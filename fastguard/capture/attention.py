"""Choose who computes a denoiser's attention, for the guard's own calls and for them alone.

Models ask torch.nn.functional.scaled_dot_product_attention, whatever processor is set on them. Within a call of the denoiser that
question goes to diffusers' dispatcher with the chosen backend instead. Nothing is set on the model (it may be shared with other
pipelines and threads) or in diffusers' registry, so there is nothing to restore, and LoRA, IP-Adapter and other processors stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch as dispatch
from torch.overrides import TorchFunctionMode

Backend = dispatch.AttentionBackendName
_ALIASES = {"sdpa": Backend.NATIVE}


def names() -> list[str]:
    """What `attention_backend` may be: diffusers' names, those without a leading underscore too, and "sdpa" for torch's own choice."""
    return sorted({*_ALIASES, *(backend.value.removeprefix("_") for backend in Backend)})


def find(name: str) -> Any:
    """The dispatcher's backend of this name; ValueError lists what there is."""
    known = {**_ALIASES, **{backend.value.removeprefix("_"): backend for backend in Backend}}
    found = known.get(name.removeprefix("_")) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"attention_backend={name!r}: allowed are None, {', '.join(names())}")
    return found


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try the backend on a few numbers of the denoiser's dtype on its device; ValueError says what is missing.

    A backend ending in "_hub" is downloaded by diffusers the first time (it asks for the `kernels` package).
    """
    backend = find(name)
    try:
        dispatch._check_attention_backend_requirements(backend)
        dispatch._maybe_download_kernel_for_backend(backend)
        query = torch.ones(1, 16, 2, 64, device=device, dtype=dtype)
        with torch.no_grad():
            result = dispatch.dispatch_attention_fn(query, query, query, backend=backend)
        if not torch.allclose(result.float(), query.float(), atol=0.05):
            raise RuntimeError("attention over equal values does not give these values back")
    except Exception as error:  # each library has its own way of saying no
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"attention_backend={name!r}: cannot run with {dtype} on {device}: {lines[0]}") from error


def attend_with(name: str | None, denoiser: Callable[..., Any]) -> Callable[..., Any]:
    """`denoiser` with its attention computed by the named backend; itself for None."""
    if name is None:
        return denoiser
    backend = find(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with _Attention(backend):
            return denoiser(*args, **kwargs)

    return call


class _Attention(TorchFunctionMode):
    """Sees every torch function that this thread calls: some microseconds each, none in a replayed graph."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _dispatched(self.backend, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dispatched(
    backend: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """[B, heads, length, size] as torch has it; the dispatcher has length before heads."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    result = dispatch.dispatch_attention_fn(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
    )
    return result.transpose(1, 2)
