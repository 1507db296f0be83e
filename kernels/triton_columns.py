"""What Triton's kernels share: how a function becomes one of Triton's, and the tables' columns, read and written one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the torch backend needs none
    triton = tl = None


def jit(function: Callable[..., Any]) -> Any:
    integers = ["n", "u_stride", "c_stride", "w_stride", "slot_stride", "slots", "steps", "y_halves", "t_halves"]
    present = [name for name in integers if name in function.__code__.co_varnames[: function.__code__.co_argcount]]
    return function if triton is None else triton.jit(function, do_not_specialize=present)


@jit
def where(condition, yes, no):
    return tl.where(condition, yes, no)


@jit
def root(value):
    return tl.sqrt(value)


# Columns one by one: TileLens takes even a static_range for a loop at run time, and then knows no column's value.
@jit
def load_3(ptr):
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)


@jit
def load_7(ptr):
    return load_3(ptr) + load_3(ptr + 3) + (tl.load(ptr + 6),)


@jit
def load_9(ptr):
    return load_3(ptr) + load_3(ptr + 3) + load_3(ptr + 6)


@jit
def load_15(ptr):
    return load_9(ptr) + load_3(ptr + 9) + load_3(ptr + 12)


@jit
def load_17(ptr):
    return load_15(ptr) + (tl.load(ptr + 15), tl.load(ptr + 16))  # noqa: RUF005 - Triton cannot unpack


@jit
def store_3(ptr, first, second, third):
    tl.store(ptr, first)
    tl.store(ptr + 1, second)
    tl.store(ptr + 2, third)


@jit
def store_15(ptr, columns):
    tl.store(ptr, columns[0])  # column 1, BASE, never changes: kept for this store it would spill on gfx942
    store_3(ptr + 2, columns[2], columns[3], columns[4])
    store_3(ptr + 5, columns[5], columns[6], columns[7])
    store_3(ptr + 8, columns[8], columns[9], columns[10])
    store_3(ptr + 11, columns[11], columns[12], columns[13])
    tl.store(ptr + 14, columns[14])


@jit
def weigh(p, x, q, e):
    """p x + q e; a product under a weight of 0 is left out, as in the torch backend: neither a NaN nor 0 + -0 = 0 gets through."""
    p, q = p.to(tl.float32), q.to(tl.float32)
    second = tl.where(q != 0, q * e, 0.0)
    return tl.where(p != 0, p * x + second, second)
