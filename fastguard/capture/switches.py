"""What is outside a model and has a say in its kernels while a graph is recorded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Switches of attention; not every torch has all of them.
_SDP = ("_get_sdp_priority_order", "_get_math_sdp_allow_fp16_bf16_reduction", "_get_fa3_sdp_enabled")
_PRECISION = (
    "allow_tf32",
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction_split_k",
    "allow_bf16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction_split_k",
    "fp32_precision",
)


WATCHES = "watches_only"  # an attribute of modes that change nothing of what a model computes


def surroundings(device: torch.device) -> str | None:
    """What around the call forbids recording: things that change what the model's functions do, and that no key can name."""
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps converted weights, which a graph would outlive"
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    foreign = [m for m in modes if not (isinstance(m, (DeviceContext, FakeTensorMode)) or getattr(m, WATCHES, False))]
    return f"the call runs under a {type(foreign[-1]).__name__}, which a replay would not ask" if foreign else None


def ambient() -> tuple[Any, ...]:
    """All of them, now; compared by value, functions by identity."""
    cuda = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.enabled,
        *_precision(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        *(str(getattr(torch._C, name)()) for name in _SDP if hasattr(torch._C, name)),
        F.scaled_dot_product_attention,  # libraries put their own in its place
        str(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]),
    )


def _precision() -> tuple[str, ...]:
    """Torch has two generations of these switches; either refuses to be read once the other was set, and old versions have one."""
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    found = []
    for switches in (backends, matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)):
        for name in _PRECISION:
            try:
                found.append(str(getattr(switches, name)))
            except (AttributeError, RuntimeError):
                found.append("-")
    return tuple(found)
