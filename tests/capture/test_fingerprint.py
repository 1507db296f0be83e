"""What the fingerprint of a model looks at. That each of it matters to an image: test_stale.py."""

from __future__ import annotations

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from fastguard.capture import attention
from fastguard.capture.fingerprint import Fingerprint, ambient


def renamed(entries):
    """Another name for the last entry: as many entries, the same values in the same order."""
    name, value = entries.popitem()
    entries[name + " renamed"] = value


def held(value):
    """A layer that holds an object, as adapters' dictionaries and processors are held."""
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.held = value
    return layer


def transposed(layer):
    layer.weight.data = layer.weight.data.t()


def resized(layer):
    layer.weight.data = layer.weight.data[:1]


def wrapped():
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight = torch.nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    return layer


CHANGES = {
    "renamed key": (lambda: held({"one": 1.0}), lambda layer: renamed(layer.held)),
    "renamed attribute": (lambda: held(1.0), lambda layer: renamed(vars(layer))),
    "renamed parameter": (lambda: held(1.0), lambda layer: renamed(layer._parameters)),
    "value": (lambda: held({"one": 1.0}), lambda layer: layer.held.update(one=2.0)),
    "item": (lambda: held([1.0]), lambda layer: layer.held.__setitem__(0, 2.0)),
    "entry moved to another": (lambda: held([[1.0], []]), lambda layer: layer.held[1].append(layer.held[0].pop())),
    "strides": (lambda: held(None), transposed),
    "size": (lambda: held(None), resized),
    "address in a subclass": (wrapped, lambda layer: setattr(layer.weight, "b", torch.ones(2, 2))),
    "strides in a subclass": (wrapped, lambda layer: setattr(layer.weight.b, "data", layer.weight.b.data.t())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name):
    make, change = CHANGES[name]
    layer = make()
    fingerprint = Fingerprint(layer)
    before = fingerprint()
    assert fingerprint() == before
    change(layer)
    after = fingerprint()
    assert after != before and fingerprint() == after


# Switches of torch and diffusers: the name of the function that sets one, or an object and its attribute.
CUDA, CUDNN, MATMUL = torch.backends.cuda, torch.backends.cudnn, torch.backends.cuda.matmul
SWITCHES = {
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "flash": (CUDA.flash_sdp_enabled, CUDA.enable_flash_sdp),
    "efficient": (CUDA.mem_efficient_sdp_enabled, CUDA.enable_mem_efficient_sdp),
    "math": (CUDA.math_sdp_enabled, CUDA.enable_math_sdp),
    "cudnn attention": (CUDA.cudnn_sdp_enabled, CUDA.enable_cudnn_sdp),
    "cudnn": (CUDNN, "enabled"),
    "cudnn benchmark": (CUDNN, "benchmark"),
    "cudnn deterministic": (CUDNN, "deterministic"),
    "cudnn tf32": (CUDNN, "allow_tf32"),
    "matmul tf32": (MATMUL, "allow_tf32"),
    "matmul fp16": (MATMUL, "allow_fp16_reduced_precision_reduction"),
    "matmul bf16": (MATMUL, "allow_bf16_reduced_precision_reduction"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_in_the_fingerprint(name):
    get, put = SWITCHES[name]
    if isinstance(put, str):
        owner, attribute = get, put
        get, put = lambda: getattr(owner, attribute), lambda value: setattr(owner, attribute, value)
    before, value = ambient(), get()
    put(not value)
    try:
        assert ambient() != before
    finally:
        put(value)


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


@pytest.mark.parametrize("switches", [torch.backends, MATMUL, CUDNN, CUDNN.conv, CUDNN.rnn], ids=str)
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
