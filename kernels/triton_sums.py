"""The sums of a step in Triton, all in one pass over a sample: d, and for anchored guidance five over the pictures x0(u), x0(c) and the anchor."""

from __future__ import annotations

from . import layout
from .triton_tables import jit, tl


@jit
def products(u_ptr, c_ptr, combined_ptr, x_ptr, anchor_ptr, half, start, n, to_read, row, BLOCK: tl.constexpr):
    """<delta, delta>, and with an anchor <a, a>, <delta, a>, <U, U> + <M, M>, <w, a> and <w, w> of `anchor.restrain`, element by element.

    anchor_ptr: x0(c) of the first row, and `half` elements after it x0(u) of the first row. to_read: n where they are written; 0 where it is this row that
    writes them, or none is read.
    """
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    delta = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32) - u
    dd = delta * delta
    aa, da, spread, wa, ww = dd, dd, dd, dd, dd
    if anchor_ptr is not None:
        scale = row[layout.E].to(tl.float32)
        x0_u = row[layout.X].to(tl.float32) * tl.load(x_ptr + offs, mask, other=0.0) + scale * u
        first_c = tl.load(anchor_ptr + offs, offs < to_read, other=0.0)
        first_u = tl.load(anchor_ptr + half + offs, offs < to_read, other=0.0)
        a = tl.where(to_read > 0, first_c - x0_u, scale * delta)
        both = (x0_u - first_u) * (x0_u - first_u) + (first_c - first_u) * (first_c - first_u)
        aa, da, spread = tl.where(mask, a * a, 0.0), delta * a, tl.where(mask & (to_read > 0), both, 0.0)
        if combined_ptr is not None:
            w = tl.load(combined_ptr + offs, mask, other=0.0).to(tl.float32) - u
            wa, ww = w * a, w * w
    return dd, aa, da, spread, wa, ww


@jit
def sums(
    u_ptr, c_ptr, combined_ptr, x_ptr, anchor_ptr, partials_ptr, b, half, n, to_read, row, BLOCK: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """`products` added up, in float64: over all of the sample here (no partial sums), or what `_norm_kernel` left. Without an anchor only the first is one."""
    if partials_ptr is None:
        dd = tl.zeros([BLOCK], tl.float32)
        aa, da, spread, wa, ww = dd, dd, dd, dd, dd
        for start in range(0, n, BLOCK):
            block = products(u_ptr, c_ptr, combined_ptr, x_ptr, anchor_ptr, half, start, n, to_read, row, BLOCK)
            dd, aa, da = dd + block[0], aa + block[1], da + block[2]
            spread, wa, ww = spread + block[3], wa + block[4], ww + block[5]
    else:
        dd, aa = partial_sums(partials_ptr, 0, b, PARTIALS), partial_sums(partials_ptr, 1, b, PARTIALS)
        da, spread = partial_sums(partials_ptr, 2, b, PARTIALS), partial_sums(partials_ptr, 3, b, PARTIALS)
        wa, ww = partial_sums(partials_ptr, 4, b, PARTIALS), partial_sums(partials_ptr, 5, b, PARTIALS)
    return total(dd), total(aa), total(da), total(spread), total(wa), total(ww)


@jit
def partial_sums(partials_ptr, which, b, PARTIALS: tl.constexpr):
    """A sample's partial sums, always added up in the same order."""
    parts = tl.num_programs(0)
    partials_ptr += (which * tl.num_programs(1).to(tl.int64) + b) * parts
    added = tl.zeros([PARTIALS], tl.float32)
    for start in range(0, parts, PARTIALS):
        offs = start + tl.arange(0, PARTIALS)
        added += tl.load(partials_ptr + offs, offs < parts, other=0.0)
    return added


@jit
def total(values):
    return tl.sum(values).to(tl.float64)


@jit
def anchor_elements(anchored, state, n):
    """(n or 0, n or 0): elements of the sample's anchor to be read, and to be written."""
    live = tl.where((anchored != 0) & (state[layout.PHASE] != layout.PLAIN), n, 0)
    written = state[layout.ANCHOR] != layout.UNWRITTEN
    return tl.where(written, live, 0), tl.where(written, 0, live)
