"""Torch's and diffusers' switches, which have a say in a model's kernels while a graph is recorded."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

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


def ambient() -> tuple[Any, ...]:
    """All of them, now; compared by value, functions by identity."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        *(cudnn.benchmark, cudnn.deterministic, cudnn.enabled),
        *_precision(),
        *(getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in ("flash", "mem_efficient", "math", "cudnn")),
        *(str(getattr(torch._C, name)()) for name in _SDP if hasattr(torch._C, name)),
        F.scaled_dot_product_attention,  # libraries put their own in its place
        str(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]),
    )


def _precision() -> tuple[str, ...]:
    """Torch has two generations of these switches; either refuses to be read once the other was set, and old versions have one."""
    backends: Any = torch.backends
    cudnn = backends.cudnn
    found = []
    for switches in (backends, backends.cuda.matmul, cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)):
        for name in _PRECISION:
            try:
                found.append(str(getattr(switches, name)))
            except (AttributeError, RuntimeError):
                found.append("-")
    return tuple(found)
