"""Choose who computes a denoiser's attention, for the guard's own calls and for them alone.

Models ask torch.nn.functional.scaled_dot_product_attention, whatever processor is set on them. Within a call of the denoiser that
question goes to diffusers' dispatcher with the chosen backend instead. Nothing is set on the model (it may be shared with other
pipelines and threads) or in diffusers' registry, so there is nothing to restore, and LoRA, IP-Adapter and other processors stay.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch as dispatch
from torch.overrides import TorchFunctionMode

from fastguard.capture.graphs import error_text

Backend = dispatch.AttentionBackendName
# What `attention_backend` may be: diffusers' names, without the leading underscore that some have, and "sdpa" for torch's own choice.
BACKENDS: dict[str, Any] = {"sdpa": Backend.NATIVE, **{backend.value.removeprefix("_"): backend for backend in Backend}}


def check(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try the backend on a few numbers of the denoiser's dtype on its device; ValueError lists what there is, or says what is missing.

    name: with or without a leading underscore. A backend ending in "_hub" is downloaded by diffusers the first time (it asks for the `kernels` package).
    """
    backend = BACKENDS.get(name.removeprefix("_")) if isinstance(name, str) else None
    if backend is None:
        raise ValueError(f"attention_backend={name!r}: allowed are None, {', '.join(sorted(BACKENDS))}")
    try:
        dispatch._check_attention_backend_requirements(backend)
        dispatch._maybe_download_kernel_for_backend(backend)
        query = torch.ones(1, 16, 2, 64, device=device, dtype=dtype)
        with torch.no_grad():
            result = dispatch.dispatch_attention_fn(query, query, query, backend=backend)
        if not torch.allclose(result.float(), query.float(), atol=0.05):
            raise RuntimeError("attention over equal values does not give these values back")
    except Exception as error:  # each library has its own way of saying no
        said = error_text(error)
        raise ValueError(f"attention_backend={name!r}: cannot run with {dtype} on {device}: {said}") from error


class Attention(TorchFunctionMode):
    """Attention by the named backend, while entered; `asked` says whether it ever was.

    Sees every torch function that this thread calls: some microseconds each, none in a replayed graph.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backend, self.asked = BACKENDS[name.removeprefix("_")], False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.asked = True
            return _dispatched(self.backend, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dispatched(backend: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """[B, heads, length, size] as torch has it; the dispatcher has length before heads, and the other arguments in torch's order."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return dispatch.dispatch_attention_fn(query, key, value, *args, backend=backend, **kwargs).transpose(1, 2)
