"""Torch's and diffusers' switches that a fingerprint names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastguard.capture import attention
from fastguard.capture.switches import ambient

# Switches of torch and diffusers: the name of the function that sets one, or an object and its attribute.
CUDA, CUDNN, MATMUL = torch.backends.cuda, torch.backends.cudnn, torch.backends.cuda.matmul
SWITCHES = {
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "flash": (CUDA.flash_sdp_enabled, CUDA.enable_flash_sdp),
    "efficient": (CUDA.mem_efficient_sdp_enabled, CUDA.enable_mem_efficient_sdp),
    "math": (CUDA.math_sdp_enabled, CUDA.enable_math_sdp),
    "cudnn attention": (CUDA.cudnn_sdp_enabled, CUDA.enable_cudnn_sdp),
    "sums of 16 bits in math attention": (
        CUDA.fp16_bf16_reduction_math_sdp_allowed,
        CUDA.allow_fp16_bf16_reduction_math_sdp,
    ),
    "cudnn": (CUDNN, "enabled"),
    "cudnn benchmark": (CUDNN, "benchmark"),
    "cudnn deterministic": (CUDNN, "deterministic"),
    "cudnn tf32": (CUDNN, "allow_tf32"),
    "matmul tf32": (MATMUL, "allow_tf32"),
    "matmul fp16 sums": (MATMUL, "allow_fp16_accumulation"),
    "matmul fp16": (MATMUL, "allow_fp16_reduced_precision_reduction"),
    "matmul bf16": (MATMUL, "allow_bf16_reduced_precision_reduction"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_in_the_fingerprint(name):
    get, put = SWITCHES[name]
    if isinstance(put, str):
        owner, attribute = get, put
        if not hasattr(owner, attribute):
            pytest.skip("this torch has none")
        get, put = lambda: getattr(owner, attribute), lambda value: setattr(owner, attribute, value)
    before, value = ambient(), get()
    put(not value)
    try:
        assert ambient() != before
    finally:
        put(value)


@pytest.mark.parametrize("name", ["allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"])
def test_split_sums_are_in_the_fingerprint(name):
    """Set as the second of a pair, which may be off only where the first is."""
    if not hasattr(MATMUL, f"{name}_split_k"):
        pytest.skip("this torch has none")
    found = []
    try:
        for split in (True, False):
            setattr(MATMUL, name, (False, split))
            found.append(ambient())
    finally:
        setattr(MATMUL, name, (True, True))
    assert found[0] != found[1]


def test_flash_attention_3_is_in_the_fingerprint(monkeypatch):
    if not hasattr(torch._C, "_get_fa3_sdp_enabled"):
        pytest.skip("this torch has none")
    before = ambient()
    monkeypatch.setattr(torch._C, "_get_fa3_sdp_enabled", lambda: "otherwise")
    assert ambient() != before


def test_the_order_of_attentions_kernels_is_in_the_fingerprint():
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
    found = []
    for kernels in (order, order[::-1]):
        with sdpa_kernel(kernels, set_priority=True):
            found.append(ambient())
    assert found[0] != found[1]


def test_attention_that_a_library_replaced_is_in_the_fingerprint(monkeypatch):
    before = ambient()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: args[0])
    assert ambient() != before


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: attention.dispatch.attention_backend("_native_math"),
    ],
    ids=["grad", "inference", "registry"],
)
def test_contexts_are_in_the_fingerprint(context):
    with torch.enable_grad():
        before = ambient()
        with context():
            assert ambient() != before
        assert ambient() == before


def test_inference_mode_is_more_than_no_grad():
    with torch.no_grad():
        before = ambient()
    with torch.inference_mode():
        assert ambient() != before


@pytest.mark.parametrize(
    "switches", [torch.backends, MATMUL, CUDNN, CUDNN.conv, CUDNN.rnn], ids=["all", "matmul", "cudnn", "conv", "rnn"]
)
def test_the_new_precision_switches_are_in_the_fingerprint(switches):
    """In the generation of switches that torch has since 2.9; setting one makes the older generation unreadable."""
    if not hasattr(switches, "fp32_precision"):
        pytest.skip("this torch has none")
    value = switches.fp32_precision
    before = ambient()
    switches.fp32_precision = "ieee" if value != "ieee" else "tf32"
    try:
        assert ambient() != before
    finally:
        switches.fp32_precision = value
