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
def load_8(ptr):
    return (
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6),
        tl.load(ptr + 7),
    )  # fmt: skip


@jit
def load_9(ptr):
    return load_8(ptr) + (tl.load(ptr + 8),)  # noqa: RUF005 - Triton cannot unpack


@jit
def load_15(ptr):
    return load_8(ptr) + (  # noqa: RUF005 - Triton cannot unpack
        tl.load(ptr + 8), tl.load(ptr + 9), tl.load(ptr + 10), tl.load(ptr + 11), tl.load(ptr + 12), tl.load(ptr + 13),
        tl.load(ptr + 14),
    )  # fmt: skip


@jit
def load_17(ptr):
    return load_15(ptr) + (tl.load(ptr + 15), tl.load(ptr + 16))  # noqa: RUF005 - Triton cannot unpack


@jit
def load_7(ptr):
    return (
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6),
    )  # fmt: skip


@jit
def load_3(ptr):
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)


@jit
def store_state(ptr, columns):
    tl.store(ptr, columns[0])  # column 1, BASE, never changes: kept for this store it would spill on gfx942
    tl.store(ptr + 2, columns[2])
    tl.store(ptr + 3, columns[3])
    tl.store(ptr + 4, columns[4])
    tl.store(ptr + 5, columns[5])
    tl.store(ptr + 6, columns[6])
    tl.store(ptr + 7, columns[7])
    tl.store(ptr + 8, columns[8])
    tl.store(ptr + 9, columns[9])
    tl.store(ptr + 10, columns[10])
    tl.store(ptr + 11, columns[11])
    tl.store(ptr + 12, columns[12])
    tl.store(ptr + 13, columns[13])
    tl.store(ptr + 14, columns[14])


@jit
def weigh(p, x, q, e):
    """p x + q e; a product under a weight of 0 is left out, as in the torch backend: neither a NaN nor 0 + -0 = 0 gets through."""
    p, q = p.to(tl.float32), q.to(tl.float32)
    second = tl.where(q != 0, q * e, 0.0)
    return tl.where(p != 0, p * x + second, second)
