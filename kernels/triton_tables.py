"""What Triton's kernels share: how a function becomes one of Triton's, and the tables' rows, read and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the torch backend needs none
    triton = tl = None

# Numbers of which no value makes another kernel.
_VARYING = [
    "n", "u_stride", "c_stride", "combined_stride", "slot_stride", "slots", "steps", "model_input_halves", "timestep_halves",
]  # fmt: skip


def jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function, do_not_specialize=_VARYING)


# Triton 3.3 takes its own functions for no arguments of another, as `decide` and `restrain` want them, but takes these.
@jit
def where(condition, yes, no):
    return tl.where(condition, yes, no)


@jit
def root(value):
    return tl.sqrt(value)


# Columns one by one: TileLens takes even a static_range for a loop at run time, and then knows no column's value.
@jit
def load_4(ptr):
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@jit
def load_rule(ptr):
    return load_4(ptr) + load_4(ptr + 4) + load_4(ptr + 8) + load_4(ptr + 12)


@jit
def load_row(ptr):
    return load_rule(ptr) + (tl.load(ptr + 16),)  # noqa: RUF005 - Triton cannot unpack


@jit
def load_state(ptr):
    return load_rule(ptr) + (tl.load(ptr + 16), tl.load(ptr + 17))  # noqa: RUF005


@jit
def store_4(ptr, values):
    tl.store(ptr, values[0])
    tl.store(ptr + 1, values[1])
    tl.store(ptr + 2, values[2])
    tl.store(ptr + 3, values[3])


@jit
def store_state(ptr, state):
    tl.store(ptr, state[0])  # column 1, BASE, never changes: kept for this store it would take more registers
    store_4(ptr + 2, state[2:6])
    store_4(ptr + 6, state[6:10])
    store_4(ptr + 10, state[10:14])
    store_4(ptr + 14, state[14:18])
