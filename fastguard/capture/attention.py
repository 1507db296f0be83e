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
# What `attention_backend` may be: diffusers' names, without the leading underscore that some have, and "sdpa" for torch's own choice.
BACKENDS: dict[str, Any] = {"sdpa": Backend.NATIVE, **{backend.value.removeprefix("_"): backend for backend in Backend}}


def find(name: str) -> Any:
    """The dispatcher's backend of this name, with or without a leading underscore; ValueError lists what there is."""
    found = BACKENDS.get(name.removeprefix("_")) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"attention_backend={name!r}: allowed are None, {', '.join(sorted(BACKENDS))}")
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


class Attending:
    """`runs`, which is `denoiser` or its compiled form, with its attention computed by the named backend (None: as it is)."""

    def __init__(self, name: str | None, denoiser: torch.nn.Module, runs: Callable[..., Any]) -> None:
        self._name, self._denoiser, self._runs = name, denoiser, runs
        self._asks_unseen = False  # it asks, but its compiled form, which counts nothing, does not show it

    def in_a_call(self) -> Callable[..., Any]:
        """For one call of the pipeline.

        ValueError at its first row if the denoiser asks for no attention: its processors compute it by themselves. (Later rows may skip
        it: diffusers' caches do.) Of a compiled denoiser the first call alone is looked at.
        """
        if self._name is None:
            return self._runs
        backend, asked = find(self._name), False

        def row(*args: Any, **kwargs: Any) -> Any:
            nonlocal asked
            with _Attention(backend) as attention:
                result = self._runs(*args, **kwargs)
            if not (asked or attention.asked or self._asks_unseen):
                self._ask_as_written(backend, args, kwargs)
            asked = True
            return result

        return row

    def _ask_as_written(self, backend: Any, args: tuple, kwargs: dict) -> None:
        with torch.compiler.set_stance("force_eager"), _Attention(backend) as attention:
            self._denoiser(*args, **kwargs)
        self._asks_unseen = attention.asked
        if not attention.asked:
            raise ValueError(
                f"attention_backend={self._name!r}: {type(self._denoiser).__name__} never calls scaled_dot_product_attention of torch, "
                f"so nothing would change; set processors that do (AttnProcessor2_0), or attention_backend=None"
            )


class _Attention(TorchFunctionMode):
    """Sees every torch function that this thread calls: some microseconds each, none in a replayed graph."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend, self.asked = backend, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.asked = True
            return _dispatched(self.backend, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dispatched(
    backend: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """[B, heads, length, size] as torch has it; the dispatcher has length before heads, and the other arguments in torch's order."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return dispatch.dispatch_attention_fn(query, key, value, *args, backend=backend, **kwargs).transpose(1, 2)
