"""The sums of anchored guidance (`anchor`) in Triton: four of one sample, over the row's pictures x0(u), x0(c) and the anchor."""

from __future__ import annotations

from contextlib import suppress

from . import codes
from .triton_columns import jit

with suppress(ImportError):
    import triton.language as tl


@jit
def anchor_terms(u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, half, start, n, known, row, BLOCK: tl.constexpr):
    """<a, a>, <delta, a>, <U, U> + <M, M> and <combined - u, a> of `anchor.push`, element by element.

    anchor_ptr: x0(c) of the first row, and `half` elements after it x0(u) of the first row. known: n where the anchor is written; 0 where it is this row that writes it, or none is read.
    """
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    delta = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32) - u
    scale = row[codes.E].to(tl.float32)
    u0 = row[codes.X].to(tl.float32) * tl.load(x_ptr + offs, mask, other=0.0) + scale * u
    first_c = tl.load(anchor_ptr + offs, offs < known, other=0.0)
    first_u = tl.load(anchor_ptr + half + offs, offs < known, other=0.0)
    a = tl.where(known > 0, first_c - u0, scale * delta)
    spread = tl.where(known > 0, (u0 - first_u) * (u0 - first_u) + (first_c - first_u) * (first_c - first_u), 0.0)
    beside = a
    if w_ptr is not None:
        beside = (tl.load(w_ptr + offs, mask, other=0.0).to(tl.float32) - u) * a
    return tl.where(mask, a * a, 0.0), delta * a, tl.where(mask, spread, 0.0), beside


@jit
def added_up(partials_ptr, kind, b, parts, PARTIALS: tl.constexpr):
    """Sum of a sample's partial sums, always in the same order."""
    partials_ptr += (kind * tl.num_programs(1).to(tl.int64) + b) * parts
    sums = tl.zeros([PARTIALS], tl.float32)
    for start in range(0, parts, PARTIALS):
        offs = start + tl.arange(0, PARTIALS)
        sums += tl.load(partials_ptr + offs, offs < parts, other=0.0)
    return tl.sum(sums)


@jit
def anchor_sums(
    u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, partials_ptr, snapshot_ptr, b, half, n, known, row, BLOCK: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """The sums of `anchor_terms` over a sample, in float64: of all of it here (no snapshot), or of what `_norm_kernel` left."""
    if snapshot_ptr is None:
        aa = tl.zeros([BLOCK], tl.float32)
        da, spread, wa = aa, aa, aa
        for start in range(0, n, BLOCK):
            terms = anchor_terms(u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, half, start, n, known, row, BLOCK)
            aa += terms[0]
            da += terms[1]
            spread += terms[2]
            wa += terms[3]
        aa, da, spread, wa = tl.sum(aa), tl.sum(da), tl.sum(spread), tl.sum(wa)
    else:
        parts = tl.num_programs(0)
        aa, da = added_up(partials_ptr, 1, b, parts, PARTIALS), added_up(partials_ptr, 2, b, parts, PARTIALS)
        spread = added_up(partials_ptr, 3, b, parts, PARTIALS)
        wa = da if w_ptr is None else added_up(partials_ptr, 4, b, parts, PARTIALS)
    return aa.to(tl.float64), da.to(tl.float64), spread.to(tl.float64), wa.to(tl.float64)


@jit
def anchor_elements(rules_ptr, state_ptr, b, n):
    """(n or 0, n or 0): elements of the sample's anchor to be read, and to be written."""
    live = tl.where(tl.load(rules_ptr + b * codes.RULE_WIDTH + codes.ANCHORED) != 0, n, 0)
    live = tl.where(tl.load(state_ptr + b * codes.STATE_WIDTH + codes.PHASE) != codes.PLAIN, live, 0)
    written = tl.load(state_ptr + b * codes.STATE_WIDTH + codes.ANCHOR) != codes.UNWRITTEN
    return tl.where(written, live, 0), tl.where(written, 0, live)
