"""`guided_step` in Triton, for CUDA and ROCm: one launch for latents of Stable Diffusion's size, two for larger ones.

A latent of at most SINGLE elements is one program's work and takes one launch: SD 1.5's 4x64x64 takes an SM about as long as the
second launch that it saves. A larger one is cut into blocks and takes two: partial sums first, then every program adds up its
sample's partials in the same order and decides for itself. There the first launch copies the state and the second reads only
that copy and writes only the state, so no program reads what another one of the same launch writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import codes
from .anchor import push
from .arguments import Operands
from .decide import decide

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the torch backend needs none
    triton = tl = None

# All sizes depend on the latent's size alone: with it the order of the sum, and so the bits of d, would change.
SINGLE = 16384
SINGLE_BLOCK, SINGLE_THREADS = 4096, 512  # 8 elements per thread: one 16-byte access in float16, two in float32
BLOCK, THREADS = 2048, 256
PARTIALS = 128  # partial sums that one program adds up at a time


def _jit(function: Callable[..., Any]) -> Any:
    integers = ["n", "u_stride", "c_stride", "w_stride", "slot_stride", "slots", "steps", "y_halves", "t_halves"]
    present = [name for name in integers if name in function.__code__.co_varnames[: function.__code__.co_argcount]]
    return function if triton is None else triton.jit(function, do_not_specialize=present)


@_jit
def _where(condition, yes, no):
    return tl.where(condition, yes, no)


@_jit
def _root(value):
    return tl.sqrt(value)


_decide = _jit(decide)
_push = _jit(push)


# Columns one by one: TileLens takes even a static_range for a loop at run time, and then knows no column's value.
@_jit
def _load_8(ptr):
    return (
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6),
        tl.load(ptr + 7),
    )  # fmt: skip


@_jit
def _load_9(ptr):
    return _load_8(ptr) + (tl.load(ptr + 8),)  # noqa: RUF005 - Triton cannot unpack


@_jit
def _load_15(ptr):
    return _load_8(ptr) + (  # noqa: RUF005 - Triton cannot unpack
        tl.load(ptr + 8), tl.load(ptr + 9), tl.load(ptr + 10), tl.load(ptr + 11), tl.load(ptr + 12), tl.load(ptr + 13),
        tl.load(ptr + 14),
    )  # fmt: skip


@_jit
def _load_17(ptr):
    return _load_15(ptr) + (tl.load(ptr + 15), tl.load(ptr + 16))  # noqa: RUF005 - Triton cannot unpack


@_jit
def _load_7(ptr):
    return (
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6),
    )  # fmt: skip


@_jit
def _load_3(ptr):
    return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)


@_jit
def _store_state(ptr, columns):
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


@_jit
def _weigh(p, x, q, e):
    """p x + q e; a product under a weight of 0 is left out, as in the torch backend: neither a NaN nor 0 + -0 = 0 gets through."""
    p, q = p.to(tl.float32), q.to(tl.float32)
    second = tl.where(q != 0, q * e, 0.0)
    return tl.where(p != 0, p * x + second, second)


@_jit
def _anchor_terms(u_ptr, c_ptr, w_ptr, x_ptr, m_ptr, half, start, n, known, row, BLOCK: tl.constexpr):
    """<a, a>, <delta, a>, <U, U> + <M, M> and <combined - u, a> of `anchor.push`, element by element.

    half: elements from m to mu. known: n where the anchor is written; 0 where it is this row that writes it, or none is read.
    """
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    delta = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32) - u
    scale = row[codes.E].to(tl.float32)
    u0 = row[codes.X].to(tl.float32) * tl.load(x_ptr + offs, mask, other=0.0) + scale * u
    m = tl.load(m_ptr + offs, offs < known, other=0.0)
    mu = tl.load(m_ptr + half + offs, offs < known, other=0.0)
    a = tl.where(known > 0, m - u0, scale * delta)
    spread = tl.where(known > 0, (u0 - mu) * (u0 - mu) + (m - mu) * (m - mu), 0.0)
    beside = a
    if w_ptr is not None:
        beside = (tl.load(w_ptr + offs, mask, other=0.0).to(tl.float32) - u) * a
    return tl.where(mask, a * a, 0.0), delta * a, tl.where(mask, spread, 0.0), beside


@_jit
def _added_up(partials_ptr, kind, b, parts, PARTIALS: tl.constexpr):
    """Sum of a sample's partial sums, always in the same order."""
    partials_ptr += (kind * tl.num_programs(1).to(tl.int64) + b) * parts
    sums = tl.zeros([PARTIALS], tl.float32)
    for start in range(0, parts, PARTIALS):
        offs = start + tl.arange(0, PARTIALS)
        sums += tl.load(partials_ptr + offs, offs < parts, other=0.0)
    return tl.sum(sums)


@_jit
def _anchor_sums(
    u_ptr, c_ptr, w_ptr, x_ptr, m_ptr, partials_ptr, snapshot_ptr, b, half, n, known, row, BLOCK: tl.constexpr, PARTIALS: tl.constexpr
):  # fmt: skip
    """The sums of `_anchor_terms` over a sample, in float64: of all of it here (no snapshot), or of what `_norm_kernel` left."""
    if snapshot_ptr is None:
        aa = tl.zeros([BLOCK], tl.float32)
        da, spread, wa = aa, aa, aa
        for start in range(0, n, BLOCK):
            terms = _anchor_terms(u_ptr, c_ptr, w_ptr, x_ptr, m_ptr, half, start, n, known, row, BLOCK)
            aa += terms[0]
            da += terms[1]
            spread += terms[2]
            wa += terms[3]
        aa, da, spread, wa = tl.sum(aa), tl.sum(da), tl.sum(spread), tl.sum(wa)
    else:
        parts = tl.num_programs(0)
        aa, da = _added_up(partials_ptr, 1, b, parts, PARTIALS), _added_up(partials_ptr, 2, b, parts, PARTIALS)
        spread = _added_up(partials_ptr, 3, b, parts, PARTIALS)
        wa = da if w_ptr is None else _added_up(partials_ptr, 4, b, parts, PARTIALS)
    return aa.to(tl.float64), da.to(tl.float64), spread.to(tl.float64), wa.to(tl.float64)


@_jit
def _known(rules_ptr, state_ptr, b, n):
    """(n or 0, n or 0): elements of the sample's anchor to be read, and to be written."""
    live = tl.where(tl.load(rules_ptr + b * codes.RULE_WIDTH + codes.ANCHORED) != 0, n, 0)
    live = tl.where(tl.load(state_ptr + b * codes.STATE_WIDTH + codes.PHASE) != codes.PLAIN, live, 0)
    written = tl.load(state_ptr + b * codes.STATE_WIDTH + codes.ANCHOR) != codes.UNWRITTEN
    return tl.where(written, live, 0), tl.where(written, 0, live)


@_jit
def _add_term(total, weight, exists, ptr, offs, mask):
    """total + weight * ptr[offs]; under a weight of 0 nothing is read."""
    weight = weight.to(tl.float32)
    if exists:  # noqa: SIM102 - `exists` is a constexpr, `weight` a device value: one condition would load both
        if weight != 0:
            total += weight * tl.load(ptr + offs, mask, other=0.0).to(tl.float32)
    return total


@_jit
def _squares(u_ptr, c_ptr, start, n, BLOCK: tl.constexpr):
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32)
    return (c - u) * (c - u)


@_jit
def _advance(
    u_ptr, c_ptr, w_ptr, x_ptr, history_ptr, y_ptr, z_ptr, m_ptr, start, n, slot_stride, y_stride, y_halves, g, as_it_is, f,
    known, fresh, row, scale, slots, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements start to start + BLOCK of one sample, to whose first element the pointers point."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    e = u
    if c_ptr is not None:
        c = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32)
        e = u + g * (c - u)
    if w_ptr is not None:
        own = tl.load(w_ptr + offs, mask, other=0.0).to(tl.float32)
        e = tl.where(as_it_is != 0, own, e)
    x = tl.load(x_ptr + offs, mask, other=0.0)
    if m_ptr is not None and c_ptr is not None:
        on_x, on_e = row[codes.X].to(tl.float32) * x, row[codes.E].to(tl.float32)
        m = tl.load(m_ptr + offs, offs < known, other=0.0)
        a = tl.where(known > 0, m - (on_x + on_e * u), on_e * (c - u))
        e = tl.where(f != 0, e - f * a, e)
        tl.store(m_ptr + offs, on_x + on_e * c, offs < fresh)
        tl.store(m_ptr + y_stride + offs, on_x + on_e * u, offs < fresh)
    m = _weigh(row[codes.P], x, row[codes.Q], e)
    x = _weigh(row[codes.A], x, row[codes.B], m)
    x = _add_term(x, row[codes.H0], slots > 0, history_ptr, offs, mask)
    x = _add_term(x, row[codes.H1], slots > 1, history_ptr + slot_stride, offs, mask)
    x = _add_term(x, row[codes.H2], slots > 2, history_ptr + 2 * slot_stride, offs, mask)
    if z_ptr is not None:
        x = _add_term(x, row[codes.N], True, z_ptr, offs, mask)
    tl.debug_barrier()  # m may overwrite a slot that threads of another layout are still reading
    tl.store(x_ptr + offs, x, mask)
    store = row[codes.STORE].to(tl.int64)
    if store >= 0:
        tl.store(history_ptr + store * slot_stride + offs, m, mask)
    if y_ptr is not None:
        y = scale.to(tl.float32) * x
        tl.store(y_ptr + offs, y, mask)
        if y_halves > 1:
            tl.store(y_ptr + y_stride + offs, y, mask)


@_jit
def _norm_kernel(
    u_ptr, c_ptr, w_ptr, x_ptr, m_ptr, state_ptr, rows_ptr, rules_ptr, snapshot_ptr, partials_ptr,
    n, u_stride, c_stride, w_stride, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of d (and over the anchor), one program per block and sample; the first block's copies the state."""
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    if part == 0:
        columns = tl.arange(0, 32)
        at = b * codes.STATE_WIDTH + columns
        mask = columns < codes.STATE_WIDTH
        tl.store(snapshot_ptr + at, tl.load(state_ptr + at, mask, other=0.0), mask)
    if c_ptr is not None:
        squares = _squares(u_ptr + b * u_stride * UNIT, c_ptr + b * c_stride * UNIT, part * BLOCK, n * UNIT, BLOCK)
        parts = tl.num_programs(0)
        tl.store(partials_ptr + b * parts + part, tl.sum(squares))
        if m_ptr is not None:
            kind = tl.num_programs(1).to(tl.int64) * parts
            n = n * UNIT
            state = state_ptr + b * codes.STATE_WIDTH
            row = _load_17(rows_ptr + (tl.load(state) + tl.load(state + codes.BASE)).to(tl.int64) * codes.ROW_WIDTH)
            known, _ = _known(rules_ptr, state_ptr, b, n)
            aa, da, spread, wa = _anchor_terms(
                u_ptr + b * u_stride * UNIT, c_ptr + b * c_stride * UNIT, None if w_ptr is None else w_ptr + b * w_stride * UNIT,
                x_ptr + b * n, m_ptr + b * n, tl.num_programs(1) * n.to(tl.int64), part * BLOCK, n, known, row, BLOCK,
            )  # fmt: skip
            partials_ptr += b * parts + part
            tl.store(partials_ptr + kind, tl.sum(aa))
            tl.store(partials_ptr + 2 * kind, tl.sum(da))
            tl.store(partials_ptr + 3 * kind, tl.sum(spread))
            if w_ptr is not None:
                tl.store(partials_ptr + 4 * kind, tl.sum(wa))


@_jit
def _step_kernel(
    u_ptr, c_ptr, w_ptr, x_ptr, history_ptr, y_ptr, trace_ptr, state_ptr, rows_ptr, rules_ptr, guidance_ptr, z_ptr, times_ptr,
    m_ptr, shares_ptr, snapshot_ptr, partials_ptr,
    n, u_stride, c_stride, w_stride, slot_stride, slots, steps, y_halves, t_halves,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The step of sample program_id(1): of all of it (no snapshot), or of block program_id(0) after `_norm_kernel`.

    Sizes and strides of latents come in units of UNIT elements: with 16 the compiler knows that 16-byte accesses are aligned.
    """
    b, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n = n * UNIT
    u_ptr += b * u_stride * UNIT
    if c_ptr is not None:
        c_ptr += b * c_stride * UNIT
    if w_ptr is not None:
        w_ptr += b * w_stride * UNIT
    first = tl.program_id(0) * BLOCK
    end = n if snapshot_ptr is None else first + BLOCK
    old_ptr = (state_ptr if snapshot_ptr is None else snapshot_ptr) + b * codes.STATE_WIDTH
    state = _load_15(old_ptr)
    k = state[codes.STEP].to(tl.int64)
    rows_ptr += (k + state[codes.BASE].to(tl.int64)) * codes.ROW_WIDTH
    row = _load_17(rows_ptr)
    if row[codes.ACTIVE] != 0:
        if c_ptr is None:
            d = tl.full([], float("nan"), tl.float32)
        elif snapshot_ptr is None:
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                squares += _squares(u_ptr, c_ptr, start, n, BLOCK)
            d = tl.sum(squares)
        else:
            d = _added_up(partials_ptr, 0, b, tl.num_programs(0), PARTIALS)
        rule = _load_9(rules_ptr + b * codes.RULE_WIDTH)
        new_state, before, as_it_is = _decide(_where, state, rule, row, d.to(tl.float64), c_ptr is not None)
        guidance_ptr += (b * steps + k) * 2
        g = tl.where(before, tl.load(guidance_ptr), tl.load(guidance_ptr + 1))
        f, known, fresh = 0.0, 0, 0
        if m_ptr is not None:
            m_ptr += b * n
            tail = _load_3(old_ptr + codes.DECIDED)
            share = tl.full([], float("nan"), tl.float64)
            non_finite = new_state[codes.NON_FINITE]
            strength, rho, written = tail[0], tail[1], tail[2]
            if c_ptr is not None:
                known, fresh = _known(rules_ptr, state_ptr if snapshot_ptr is None else snapshot_ptr, b, n)
                aa, da, spread, wa = _anchor_sums(
                    u_ptr, c_ptr, w_ptr, x_ptr + b * n, m_ptr, partials_ptr, snapshot_ptr, b, batch * n.to(tl.int64), n, known,
                    _load_17(rows_ptr), BLOCK, PARTIALS,
                )  # fmt: skip
                tail, share, f, scaled, as_it_is = _push(
                    _where, _root, (non_finite, strength, rho, written), new_state[codes.PHASE], state[codes.STEP],
                    _load_7(rules_ptr + b * codes.RULE_WIDTH + codes.RULED), _load_17(rows_ptr), (aa, da, spread, wa), g.to(tl.float64),
                    as_it_is if w_ptr is not None else 0.0,
                )  # fmt: skip
                non_finite, strength, rho, written = tail
                g, f = scaled.to(tl.float32), f.to(tl.float32)
        next_row_ptr = rows_ptr + codes.ROW_WIDTH
        if first == 0:
            tl.debug_barrier()  # every thread has read the state that is overwritten here
            _store_state(state_ptr + b * codes.STATE_WIDTH, new_state)
            if m_ptr is not None:
                tl.store(state_ptr + b * codes.STATE_WIDTH + codes.NON_FINITE, non_finite)
                tl.store(state_ptr + b * codes.STATE_WIDTH + codes.DECIDED, strength)
                tl.store(state_ptr + b * codes.STATE_WIDTH + codes.DECIDED + 1, rho)
                tl.store(state_ptr + b * codes.STATE_WIDTH + codes.DECIDED + 2, written)
                tl.store(shares_ptr + k * batch + b, share)
            tl.store(trace_ptr + k * batch + b, d)
            if times_ptr is not None:
                time = tl.load(next_row_ptr + codes.TIMESTEP)
                tl.store(times_ptr + b, time)
                if t_halves > 1:
                    tl.store(times_ptr + batch + b, time)
        row = _load_17(rows_ptr)  # again: held across the decision, 15 doubles would spill on gfx942
        scale = tl.load(next_row_ptr + codes.S)
        for start in range(first, end, BLOCK):
            _advance(
                u_ptr, c_ptr, w_ptr, x_ptr + b * n, history_ptr + b * n, None if y_ptr is None else y_ptr + b * n,
                None if z_ptr is None else z_ptr + b * n, m_ptr, start, n, slot_stride.to(tl.int64) * UNIT, batch * n.to(tl.int64), y_halves,
                g, as_it_is, f, known, fresh, row, scale, slots, BLOCK,
            )  # fmt: skip


def launch_shape(
    size: int, aligned: bool = True, hip: bool = torch.version.hip is not None
) -> tuple[int, int, dict[str, int]]:
    """Elements per block, blocks per sample and compiler options for latents of `size` elements: the whole heuristic.

    Where accesses are not aligned to 16 bytes every element has a mask of its own: half as many, or gfx942 spills them.
    """
    warp, part = (64 if hip else 32), (1 if aligned else 2)
    if size > SINGLE:
        block = BLOCK // part
        return block, -(-size // block), {"num_warps": THREADS // warp}
    # One program per SM is all there is, so let it have 128 registers: at its own choice of 64, ptxas spills on sm_100.
    limit = {} if hip else {"maxnreg": 128}
    return SINGLE_BLOCK // part, 1, {"num_warps": SINGLE_THREADS // warp, **limit}


def guided_step_triton(operands: Operands) -> None:
    u, c, w, x, history, model_input, trace, state, rows, rules, guidance, z = operands[:12]
    timestep_out, anchor, shares, scratch = operands[12:]
    assert scratch is not None
    batch = x.shape[0]
    size = x.numel() // batch
    latents = [t for t in (u, c, w, x, history, model_input, z, anchor) if t is not None]
    strides = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in (u, c, w, history)]
    aligned = all(number % 16 == 0 for number in (size, *strides)) and all(t.data_ptr() % 16 == 0 for t in latents)
    unit = 16 if aligned else 1
    n, u_stride, c_stride, w_stride, slot_stride = (number // unit for number in (size, *strides))
    block, parts, options = launch_shape(size, aligned)
    snapshot = partials = None
    if parts > 1:
        snapshot = scratch[: 2 * state.numel()].view(torch.float64)
        partials = scratch[2 * state.numel() :]
        _norm_kernel[(parts, batch)](
            u, c, w, x, anchor, state, rows, rules, snapshot, partials, n, u_stride, c_stride, w_stride,
            UNIT=unit, BLOCK=block, **options,
        )  # fmt: skip
    _step_kernel[(parts, batch)](
        u, c, w, x, history, model_input, trace, state, rows, rules, guidance, z, timestep_out, anchor, shares, snapshot, partials,
        n, u_stride, c_stride, w_stride, slot_stride, history.shape[0], guidance.shape[1],
        0 if model_input is None else model_input.shape[0] // batch,
        0 if timestep_out is None else timestep_out.shape[0] // batch,
        UNIT=unit, BLOCK=block, PARTIALS=PARTIALS, **options,
    )  # fmt: skip
