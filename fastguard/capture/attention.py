"""Choose who computes a denoiser's attention, for the guard's own calls and for them alone.

Models ask torch.nn.functional.scaled_dot_product_attention, whatever processor is set on them. Within a call of the denoiser that
question goes to diffusers' dispatcher with the chosen backend instead. Nothing is set on the model (it may be shared with other
pipelines and threads) or in diffusers' registry, so there is nothing to restore, and LoRA, IP-Adapter and other processors stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch as dispatch
from torch.overrides import TorchFunctionMode

from fastguard.capture.torch_compile import is_compiled

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


def head_sizes(denoiser: torch.nn.Module) -> list[int]:
    """Of the denoiser's attention modules; 64, which everybody can do, where it has none of diffusers' kind."""
    shapes = ((getattr(m, "inner_dim", None), getattr(m, "heads", None)) for m in denoiser.modules())
    return sorted({d // n for d, n in shapes if isinstance(d, int) and isinstance(n, int)}) or [64]


def check(name: str, device: torch.device, dtype: torch.dtype, sizes: Iterable[int]) -> None:
    """Try the backend on a few numbers of the denoiser's dtype and head sizes on its device; ValueError says what is missing.

    A backend ending in "_hub" is downloaded by diffusers the first time (it asks for the `kernels` package).
    """
    backend, tried = find(name), ""
    try:
        dispatch._check_attention_backend_requirements(backend)
        dispatch._maybe_download_kernel_for_backend(backend)
        for size in sizes:
            tried = f" and heads of {size}"
            query = torch.ones(1, 16, 2, size, device=device, dtype=dtype)
            with torch.no_grad():
                result = dispatch.dispatch_attention_fn(query, query, query, backend=backend)
            if not torch.allclose(result.float(), query.float(), atol=0.05):
                raise RuntimeError("attention over equal values does not give these values back")
    except Exception as error:  # each library has its own way of saying no
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"attention_backend={name!r}: cannot run with {dtype}{tried} on {device}: {lines[0]}"
        ) from error


class Ignored(ValueError):
    """The denoiser never asked for what `attention_backend` names."""


class Attending:
    """`runs`, which is `denoiser` or its compiled form, with its attention computed by the named backend (None: as it is)."""

    def __init__(self, name: str | None, denoiser: torch.nn.Module, runs: Callable[..., Any]) -> None:
        self._name, self._denoiser, self._runs = name, denoiser, runs
        self._compiled_asks = False

    def in_a_call(self) -> Callable[..., Any]:
        """For one call of the pipeline.

        Its first row raises Ignored if the denoiser asks for no attention: its processors compute it by themselves. (Later rows may skip
        it: diffusers' caches do.) Of a compiled denoiser, which counts nothing, the first call alone is looked at.
        """
        if self._name is None:
            return self._runs
        backend, asked = find(self._name), self._compiled_asks

        def row(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            if not asked and self._runs is not self._denoiser:
                self._ask_as_written(backend, args, kwargs)
                asked = True
            with _Attention(backend) as attention:
                result = self._runs(*args, **kwargs)
            if not asked and not attention.asked:
                self._ask_as_written(backend, args, kwargs)
            asked = True
            return result

        return row

    def _ask_as_written(self, backend: Any, args: tuple, kwargs: dict) -> None:
        if self._runs is not self._denoiser or is_compiled(self._denoiser.modules()):
            with torch.compiler.set_stance("force_eager"), _Attention(backend) as attention:
                self._denoiser(*args, **kwargs)
            self._compiled_asks = bool(attention.asked)
        if not self._compiled_asks:
            raise Ignored(
                f"attention_backend={self._name!r}: {type(self._denoiser).__name__} never calls scaled_dot_product_attention of torch, "
                f"so nothing would change; set processors that do (AttnProcessor2_0), or attention_backend=None"
            )


class _Attention(TorchFunctionMode):
    """Sees every torch function that this thread calls: some microseconds each, none in a replayed graph."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend, self.asked = backend, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.asked += 1
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
