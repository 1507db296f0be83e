"""`guided_step` in Triton, for CUDA and ROCm: one launch for latents of Stable Diffusion's size, two for larger ones.

A latent of at most SINGLE elements is one program's work and takes one launch: SD 1.5's 4x64x64 takes an SM about as long as the
second launch that it saves. A larger one is cut into blocks and takes two: partial sums first, then every program adds up its
sample's partials in the same order and decides for itself. There the first launch copies the state and the second reads only
that copy and writes only the state, so no program reads what another one of the same launch writes.
"""

from __future__ import annotations

import torch

from . import layout
from .anchor import restrain
from .arguments import Operands
from .decide import decide
from .triton_sums import anchor_elements, products, sums
from .triton_tables import jit, load_row, load_rule, load_state, root, store_state, tl, where

# All sizes depend on the latent's size alone: with it the order of the sum, and so the bits of d, would change.
SINGLE = 16384
SINGLE_BLOCK, SINGLE_THREADS = 4096, 512  # 8 elements per thread: one 16-byte access in float16, two in float32
BLOCK, THREADS = 2048, 256
PARTIALS = 128  # partial sums that one program adds up at a time

HIP = torch.version.hip is not None

_decide, _restrain = jit(decide), jit(restrain)


@jit
def _weighted(p, x, q, e):
    """p x + q e; a product under a weight of 0 is left out, as in the torch backend: neither a NaN nor 0 + -0 = 0 gets through."""
    p, q = p.to(tl.float32), q.to(tl.float32)
    second = tl.where(q != 0, q * e, 0.0)
    return tl.where(p != 0, p * x + second, second)


@jit
def _add_term(total, weight, exists, ptr, offs, mask):
    """total + weight * ptr[offs]; under a weight of 0 nothing is read."""
    weight = weight.to(tl.float32)
    if exists:  # noqa: SIM102 - TileLens follows no `if` of two comparisons
        if weight != 0:
            total += weight * tl.load(ptr + offs, mask, other=0.0).to(tl.float32)
    return total


@jit
def _guided_output(
    u_ptr, c_ptr, combined_ptr, anchor_ptr, x, offs, mask, half, g, own_weight, f, to_read, to_write, row
):
    """e = u + g delta - f a, or the caller's own combination; at an anchored sample's first row its anchor is written."""
    u = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    e = u
    if c_ptr is not None:
        c = tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32)
        e = u + g * (c - u)
    if combined_ptr is not None:
        combined = tl.load(combined_ptr + offs, mask, other=0.0).to(tl.float32)
        e = tl.where(own_weight == 1, combined, tl.where(own_weight != 0, u + own_weight * (combined - u), e))
    if anchor_ptr is not None and c_ptr is not None:
        on_x, on_e = row[layout.X].to(tl.float32) * x, row[layout.E].to(tl.float32)
        first_c = tl.load(anchor_ptr + offs, offs < to_read, other=0.0)
        a = tl.where(to_read > 0, first_c - (on_x + on_e * u), on_e * (c - u))
        e = tl.where(f != 0, e - f * a, e)
        tl.store(anchor_ptr + offs, on_x + on_e * c, offs < to_write)
        tl.store(anchor_ptr + half + offs, on_x + on_e * u, offs < to_write)
    return e


@jit
def _norm_kernel(
    u_ptr, c_ptr, combined_ptr, x_ptr, anchor_ptr, state_ptr, rows_ptr, rules_ptr, snapshot_ptr, partials_ptr,
    n, u_stride, c_stride, combined_stride, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of d (and over the anchor), one program per block and sample; the first block's copies the state."""
    b, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    part, parts = tl.program_id(0), tl.num_programs(0)
    if part == 0:
        columns = tl.arange(0, 32)
        at = b * layout.STATE_WIDTH + columns
        mask = columns < layout.STATE_WIDTH
        tl.store(snapshot_ptr + at, tl.load(state_ptr + at, mask, other=0.0), mask)
    if c_ptr is not None:
        n, to_read, row = n * UNIT, 0, 0
        if anchor_ptr is not None:
            state = load_state(state_ptr + b * layout.STATE_WIDTH)
            row = load_row(rows_ptr + (state[layout.STEP] + state[layout.BASE]).to(tl.int64) * layout.ROW_WIDTH)
            to_read, _ = anchor_elements(tl.load(rules_ptr + b * layout.RULE_WIDTH + layout.ANCHORED), state, n)
            anchor_ptr += b * n
        block = products(
            u_ptr + b * u_stride * UNIT, c_ptr + b * c_stride * UNIT,
            None if combined_ptr is None else combined_ptr + b * combined_stride * UNIT,  # moved before the call it would spill on sm_90
            x_ptr + b * n, anchor_ptr, batch * n, part * BLOCK, n, to_read, row, BLOCK,
        )  # fmt: skip
        partials_ptr += b * parts + part
        tl.store(partials_ptr, tl.sum(block[0]))
        if anchor_ptr is not None:
            apart = batch * parts
            tl.store(partials_ptr + apart, tl.sum(block[1]))
            tl.store(partials_ptr + 2 * apart, tl.sum(block[2]))
            tl.store(partials_ptr + 3 * apart, tl.sum(block[3]))
            tl.store(partials_ptr + 4 * apart, tl.sum(block[4]))
            tl.store(partials_ptr + 5 * apart, tl.sum(block[5]))


@jit
def _step_kernel(
    u_ptr, c_ptr, combined_ptr, x_ptr, history_ptr, model_input_ptr, trace_ptr, state_ptr, rows_ptr, rules_ptr, guidance_ptr, noise_ptr,
    timestep_ptr, anchor_ptr, shares_ptr, snapshot_ptr, partials_ptr,
    n, u_stride, c_stride, combined_stride, slot_stride, slots, steps, model_input_halves, timestep_halves,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, PARTIALS: tl.constexpr,
):  # fmt: skip
    """The step of sample program_id(1): of all of it (no snapshot), or of block program_id(0) after `_norm_kernel`.

    Sizes and strides of latents come in units of UNIT elements: with 16 the compiler knows that 16-byte accesses are aligned.
    """
    b, batch = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n, slot_stride = n * UNIT, slot_stride.to(tl.int64) * UNIT
    half = batch * n.to(tl.int64)
    u_ptr += b * u_stride * UNIT
    if c_ptr is not None:
        c_ptr += b * c_stride * UNIT
    if combined_ptr is not None:
        combined_ptr += b * combined_stride * UNIT
    x_ptr += b * n
    begin = tl.program_id(0) * BLOCK
    end = n if snapshot_ptr is None else begin + BLOCK
    old_state_ptr = state_ptr if snapshot_ptr is None else snapshot_ptr
    state = load_state(old_state_ptr + b * layout.STATE_WIDTH)
    k = state[layout.STEP].to(tl.int64)
    rows_ptr += (k + state[layout.BASE].to(tl.int64)) * layout.ROW_WIDTH
    row = load_row(rows_ptr)
    if row[layout.ACTIVE] != 0:
        to_read, to_write = 0, 0
        if anchor_ptr is not None:
            anchor_ptr += b * n
            to_read, to_write = anchor_elements(tl.load(rules_ptr + b * layout.RULE_WIDTH + layout.ANCHORED), state, n)
        d, f, share = tl.full([], float("nan"), tl.float64), 0.0, tl.full([], float("nan"), tl.float64)
        if c_ptr is not None:
            found = sums(u_ptr, c_ptr, combined_ptr, x_ptr, anchor_ptr, partials_ptr, b, half, n, to_read, row, BLOCK, PARTIALS)  # fmt: skip
            d = found[0]
        rule = load_rule(rules_ptr + b * layout.RULE_WIDTH)
        state, before, own_weight = _decide(where, state, rule, row, d, c_ptr is not None)
        guidance_ptr += (b * steps + k) * 2
        g = tl.where(before, tl.load(guidance_ptr), tl.load(guidance_ptr + 1))
        if anchor_ptr is not None and c_ptr is not None:
            own_weight = 0.0 if combined_ptr is None else own_weight
            state, share, f, g, own_weight = _restrain(
                where, root, state, rule, row, found, g.to(tl.float64), own_weight
            )
            f, g, own_weight = f.to(tl.float32), g.to(tl.float32), own_weight.to(tl.float32)
        next_row_ptr = rows_ptr + layout.ROW_WIDTH
        if begin == 0:
            tl.debug_barrier()  # every thread has read the state that is overwritten here
            store_state(state_ptr + b * layout.STATE_WIDTH, state)
            tl.store(trace_ptr + k * batch + b, d)
            if anchor_ptr is not None:
                tl.store(shares_ptr + k * batch + b, share)
            if timestep_ptr is not None:
                timestep = tl.load(next_row_ptr + layout.TIMESTEP)
                tl.store(timestep_ptr + b, timestep)
                if timestep_halves > 1:
                    tl.store(timestep_ptr + batch + b, timestep)
        row = load_row(rows_ptr)  # again: held across the decision, 17 doubles would spill on gfx942
        scale = tl.load(next_row_ptr + layout.S)
        for start in range(begin, end, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < n
            x = tl.load(x_ptr + offs, mask, other=0.0)
            e = _guided_output(u_ptr, c_ptr, combined_ptr, anchor_ptr, x, offs, mask, half, g, own_weight, f, to_read, to_write, row)  # fmt: skip
            m = _weighted(row[layout.P], x, row[layout.Q], e)
            x = _weighted(row[layout.A], x, row[layout.B], m)
            slot_ptr = history_ptr + b * n
            x = _add_term(x, row[layout.H0], slots > 0, slot_ptr, offs, mask)
            x = _add_term(x, row[layout.H1], slots > 1, slot_ptr + slot_stride, offs, mask)
            x = _add_term(x, row[layout.H2], slots > 2, slot_ptr + 2 * slot_stride, offs, mask)
            if noise_ptr is not None:
                x = _add_term(x, row[layout.N], True, noise_ptr + b * n, offs, mask)
            tl.debug_barrier()  # m may overwrite a slot that threads of another layout are still reading
            tl.store(x_ptr + offs, x, mask)
            store = row[layout.STORE].to(tl.int64)
            if store >= 0:
                tl.store(slot_ptr + store * slot_stride + offs, m, mask)
            if model_input_ptr is not None:
                next_input = scale.to(tl.float32) * x
                tl.store(model_input_ptr + b * n + offs, next_input, mask)
                if model_input_halves > 1:
                    tl.store(model_input_ptr + b * n + half + offs, next_input, mask)


def launch_shape(size: int, aligned: bool = True, hip: bool = HIP) -> tuple[int, int, dict[str, int]]:
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


def guided_step_triton(o: Operands) -> None:
    """Operands as `guided_step` copied them, with scratch: nothing here waits, copies or allocates."""
    assert o.scratch is not None
    batch, size = len(o.x), o.x.numel() // len(o.x)
    latents = (o.uncond, o.cond, o.combined, o.x, o.history, o.model_input, o.noise, o.anchor)
    strides = [0 if t is None or len(t) == 1 else t.stride(0) for t in (o.uncond, o.cond, o.combined, o.history)]
    addresses = [t.data_ptr() for t in latents if t is not None]
    aligned = all(number % 16 == 0 for number in (size, *strides, *addresses))
    unit = 16 if aligned else 1
    n, u_stride, c_stride, combined_stride, slot_stride = (number // unit for number in (size, *strides))
    block, parts, options = launch_shape(size, aligned)
    snapshot = partials = None
    if parts > 1:
        snapshot, partials = o.scratch[: 2 * o.state.numel()].view(torch.float64), o.scratch[2 * o.state.numel() :]
        _norm_kernel[(parts, batch)](
            o.uncond, o.cond, o.combined, o.x, o.anchor, o.state, o.rows, o.rules, snapshot, partials, n, u_stride, c_stride, combined_stride,
            UNIT=unit, BLOCK=block, **options,
        )  # fmt: skip
    halves = (0 if tensor is None else len(tensor) // batch for tensor in (o.model_input, o.timestep_out))
    _step_kernel[(parts, batch)](
        o.uncond, o.cond, o.combined, o.x, o.history, o.model_input, o.trace, o.state, o.rows, o.rules, o.guidance, o.noise, o.timestep_out,
        o.anchor, o.shares, snapshot, partials, n, u_stride, c_stride, combined_stride, slot_stride, len(o.history), o.guidance.shape[1], *halves,
        UNIT=unit, BLOCK=block, PARTIALS=PARTIALS, **options,
    )  # fmt: skip
