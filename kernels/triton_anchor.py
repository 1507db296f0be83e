"""The sums of a step in Triton, all in one pass over a sample: d, and for anchored guidance five over the pictures x0(u), x0(c) and the anchor."""

from __future__ import annotations

from . import codes
from .triton_columns import jit, tl


@jit
def terms(u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, half, start, n, known, row, BLOCK: tl.constexpr):
    """<delta, delta>, and with an anchor <a, a>, <delta, a>, <U, U> + <M, M>, <combined - u, a> and |combined - u|^2 of `anchor.push`,
    element by element.

    anchor_ptr: x0(c) of the first row, and `half` elements after it x0(u) of the first row. known: n where the anchor is written; 0 where it is this row that writes it, or none is read.
    """
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    delta = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32) - u
    squares = delta * delta
    aa, da, spread, wa, ww = squares, squares, squares, squares, squares
    if anchor_ptr is not None:
        scale = row[codes.E].to(tl.float32)
        u0 = row[codes.X].to(tl.float32) * tl.load(x_ptr + offs, mask, other=0.0) + scale * u
        first_c = tl.load(anchor_ptr + offs, offs < known, other=0.0)
        first_u = tl.load(anchor_ptr + half + offs, offs < known, other=0.0)
        a = tl.where(known > 0, first_c - u0, scale * delta)
        both = (u0 - first_u) * (u0 - first_u) + (first_c - first_u) * (first_c - first_u)
        aa, da, spread = tl.where(mask, a * a, 0.0), delta * a, tl.where(mask & (known > 0), both, 0.0)
        if w_ptr is not None:
            w = tl.load(w_ptr + offs, mask, other=0.0).to(tl.float32) - u
            wa, ww = w * a, w * w
    return squares, aa, da, spread, wa, ww


@jit
def sums(
    u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, partials_ptr, b, half, n, known, row, BLOCK: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """`terms` added up: over all of the sample here (no partial sums), or what `_norm_kernel` left. Without an anchor only the first is one."""
    if partials_ptr is None:
        d = tl.zeros([BLOCK], tl.float32)
        aa, da, spread, wa, ww = d, d, d, d, d
        for start in range(0, n, BLOCK):
            block = terms(u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, half, start, n, known, row, BLOCK)
            d += block[0]
            if anchor_ptr is not None:
                aa += block[1]
                da += block[2]
                spread += block[3]
            if w_ptr is not None:
                wa += block[4]
                ww += block[5]
        d, aa, da, spread, wa, ww = tl.sum(d), tl.sum(aa), tl.sum(da), tl.sum(spread), tl.sum(wa), tl.sum(ww)
    else:
        d = added_up(partials_ptr, 0, b, PARTIALS)
        aa, da, spread, wa, ww = d, d, d, d, d
        if anchor_ptr is not None:
            aa, da = added_up(partials_ptr, 1, b, PARTIALS), added_up(partials_ptr, 2, b, PARTIALS)
            spread = added_up(partials_ptr, 3, b, PARTIALS)
            if w_ptr is not None:
                wa, ww = added_up(partials_ptr, 4, b, PARTIALS), added_up(partials_ptr, 5, b, PARTIALS)
    return d, aa, da, spread, wa, ww


@jit
def added_up(partials_ptr, kind, b, PARTIALS: tl.constexpr):
    """Sum of a sample's partial sums, always in the same order."""
    parts = tl.num_programs(0)
    partials_ptr += (kind * tl.num_programs(1).to(tl.int64) + b) * parts
    total = tl.zeros([PARTIALS], tl.float32)
    for start in range(0, parts, PARTIALS):
        offs = start + tl.arange(0, PARTIALS)
        total += tl.load(partials_ptr + offs, offs < parts, other=0.0)
    return tl.sum(total)


@jit
def anchor_elements(rules_ptr, state_ptr, b, n):
    """(n or 0, n or 0): elements of the sample's anchor to be read, and to be written."""
    live = tl.where(tl.load(rules_ptr + b * codes.RULE_WIDTH + codes.ANCHORED) != 0, n, 0)
    live = tl.where(tl.load(state_ptr + b * codes.STATE_WIDTH + codes.PHASE) != codes.PLAIN, live, 0)
    written = tl.load(state_ptr + b * codes.STATE_WIDTH + codes.ANCHOR) != codes.UNWRITTEN
    return tl.where(written, live, 0), tl.where(written, 0, live)
