"""`guided_step` in Triton, for CUDA and ROCm: one launch for latents of Stable Diffusion's size, two for larger ones.

A latent of at most SINGLE elements is one program's work and takes one launch: SD 1.5's 4x64x64 takes an SM about as long as the
second launch that it saves. A larger one is cut into blocks and takes two: partial sums first, then every program adds up its
sample's partials in the same order and decides for itself. There the first launch copies the state and the second reads only
that copy and writes only the state, so no program reads what another one of the same launch writes.
"""

from __future__ import annotations

import torch

from . import codes
from .anchor import push
from .arguments import Operands
from .decide import decide
from .triton_anchor import anchor_elements, sums, terms
from .triton_columns import jit, load_3, load_7, load_9, load_15, load_17, root, store_3, store_15, tl, weigh, where

# All sizes depend on the latent's size alone: with it the order of the sum, and so the bits of d, would change.
SINGLE = 16384
SINGLE_BLOCK, SINGLE_THREADS = 4096, 512  # 8 elements per thread: one 16-byte access in float16, two in float32
BLOCK, THREADS = 2048, 256
PARTIALS = 128  # partial sums that one program adds up at a time


_decide = jit(decide)
_push = jit(push)


@jit
def _add_term(total, weight, exists, ptr, offs, mask):
    """total + weight * ptr[offs]; under a weight of 0 nothing is read."""
    weight = weight.to(tl.float32)
    if exists:  # noqa: SIM102 - `exists` is a constexpr, `weight` a device value: one condition would load both
        if weight != 0:
            total += weight * tl.load(ptr + offs, mask, other=0.0).to(tl.float32)
    return total


@jit
def _advance(
    u_ptr, c_ptr, w_ptr, x_ptr, history_ptr, y_ptr, z_ptr, anchor_ptr, start, n, slot_stride, y_stride, y_halves, g, as_it_is, f,
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
        e = tl.where(as_it_is == 1, own, tl.where(as_it_is != 0, u + as_it_is * (own - u), e))
    x = tl.load(x_ptr + offs, mask, other=0.0)
    if anchor_ptr is not None and c_ptr is not None:
        on_x, on_e = row[codes.X].to(tl.float32) * x, row[codes.E].to(tl.float32)
        first_c = tl.load(anchor_ptr + offs, offs < known, other=0.0)
        a = tl.where(known > 0, first_c - (on_x + on_e * u), on_e * (c - u))
        e = tl.where(f != 0, e - f * a, e)
        tl.store(anchor_ptr + offs, on_x + on_e * c, offs < fresh)
        tl.store(anchor_ptr + y_stride + offs, on_x + on_e * u, offs < fresh)
    m = weigh(row[codes.P], x, row[codes.Q], e)
    x = weigh(row[codes.A], x, row[codes.B], m)
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


@jit
def _norm_kernel(
    u_ptr, c_ptr, w_ptr, x_ptr, anchor_ptr, state_ptr, rows_ptr, rules_ptr, snapshot_ptr, partials_ptr,
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
        n, known, row = n * UNIT, 0, 0
        if anchor_ptr is not None:
            state = state_ptr + b * codes.STATE_WIDTH
            row = load_17(rows_ptr + (tl.load(state) + tl.load(state + codes.BASE)).to(tl.int64) * codes.ROW_WIDTH)
            known, _ = anchor_elements(rules_ptr, state_ptr, b, n)
            anchor_ptr += b * n
        block = terms(
            u_ptr + b * u_stride * UNIT, c_ptr + b * c_stride * UNIT, None if w_ptr is None else w_ptr + b * w_stride * UNIT,
            x_ptr + b * n, anchor_ptr, tl.num_programs(1) * n.to(tl.int64), part * BLOCK, n, known, row, BLOCK,
        )  # fmt: skip
        kind = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
        partials_ptr += b * tl.num_programs(0) + part
        tl.store(partials_ptr, tl.sum(block[0]))
        if anchor_ptr is not None:
            tl.store(partials_ptr + kind, tl.sum(block[1]))
            tl.store(partials_ptr + 2 * kind, tl.sum(block[2]))
            tl.store(partials_ptr + 3 * kind, tl.sum(block[3]))
            if w_ptr is not None:
                tl.store(partials_ptr + 4 * kind, tl.sum(block[4]))
                tl.store(partials_ptr + 5 * kind, tl.sum(block[5]))


@jit
def _step_kernel(
    u_ptr, c_ptr, w_ptr, x_ptr, history_ptr, y_ptr, trace_ptr, state_ptr, rows_ptr, rules_ptr, guidance_ptr, z_ptr, times_ptr,
    anchor_ptr, shares_ptr, snapshot_ptr, partials_ptr,
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
    old_tables_ptr = state_ptr if snapshot_ptr is None else snapshot_ptr
    old_ptr = old_tables_ptr + b * codes.STATE_WIDTH
    state = load_15(old_ptr)
    k = state[codes.STEP].to(tl.int64)
    rows_ptr += (k + state[codes.BASE].to(tl.int64)) * codes.ROW_WIDTH
    row = load_17(rows_ptr)
    if row[codes.ACTIVE] != 0:
        known, fresh = 0, 0
        if c_ptr is None:
            d = tl.full([], float("nan"), tl.float32)
        else:
            if anchor_ptr is not None:
                anchor_ptr += b * n
                known, fresh = anchor_elements(rules_ptr, old_tables_ptr, b, n)
            d, aa, da, spread, wa, ww = sums(
                u_ptr, c_ptr, w_ptr, x_ptr + b * n, anchor_ptr, partials_ptr, b, batch * n.to(tl.int64), n, known, row, BLOCK, PARTIALS
            )  # fmt: skip
        rule = load_9(rules_ptr + b * codes.RULE_WIDTH)
        new_state, before, as_it_is = _decide(where, state, rule, row, d.to(tl.float64), c_ptr is not None)
        guidance_ptr += (b * steps + k) * 2
        g = tl.where(before, tl.load(guidance_ptr), tl.load(guidance_ptr + 1))
        f = 0.0
        if anchor_ptr is not None:
            share = tl.full([], float("nan"), tl.float64)
            non_finite = new_state[codes.NON_FINITE]
            length, rho, written = load_3(old_ptr + codes.DECIDED)
            if c_ptr is not None:
                pairs = (
                    d.to(tl.float64), aa.to(tl.float64), da.to(tl.float64), spread.to(tl.float64), wa.to(tl.float64), ww.to(tl.float64)
                )  # fmt: skip
                tail, share, f, scaled, as_it_is = _push(
                    where, root, (non_finite, length, rho, written), new_state[codes.PHASE], state[codes.STEP],
                    load_7(rules_ptr + b * codes.RULE_WIDTH + codes.RULED), load_17(rows_ptr), pairs, g.to(tl.float64),
                    as_it_is if w_ptr is not None else 0.0,
                )  # fmt: skip
                non_finite, length, rho, written = tail
                g, f, as_it_is = scaled.to(tl.float32), f.to(tl.float32), as_it_is.to(tl.float32)
        next_row_ptr = rows_ptr + codes.ROW_WIDTH
        if first == 0:
            tl.debug_barrier()  # every thread has read the state that is overwritten here
            state_ptr += b * codes.STATE_WIDTH
            store_15(state_ptr, new_state)
            if anchor_ptr is not None:
                tl.store(state_ptr + codes.NON_FINITE, non_finite)
                store_3(state_ptr + codes.DECIDED, length, rho, written)
                tl.store(shares_ptr + k * batch + b, share)
            tl.store(trace_ptr + k * batch + b, d)
            if times_ptr is not None:
                time = tl.load(next_row_ptr + codes.TIMESTEP)
                tl.store(times_ptr + b, time)
                if t_halves > 1:
                    tl.store(times_ptr + batch + b, time)
        row = load_17(rows_ptr)  # again: held across the decision, 17 doubles would spill on gfx942
        scale = tl.load(next_row_ptr + codes.S)
        for start in range(first, end, BLOCK):
            _advance(
                u_ptr, c_ptr, w_ptr, x_ptr + b * n, history_ptr + b * n, None if y_ptr is None else y_ptr + b * n,
                None if z_ptr is None else z_ptr + b * n, anchor_ptr, start, n, slot_stride.to(tl.int64) * UNIT, batch * n.to(tl.int64), y_halves,
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
    u, c, x, history, model_input, trace, state, rows, rules, guidance, w, z, timestep_out, anchor, shares, scratch = (
        operands
    )
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
