"""Everything between two denoiser calls as one operation: norm of the guidance, decision, guided output, scheduler step.

For every sample b of the batch, with k = state[b, STEP], row r = rows[state[b, BASE] + k] and delta = c - u:

    d = ||delta||^2                                            trace[k, b] = d
    g = guidance[b, k, 0 before the transition | 1 otherwise]  (`decide`: the transition of Jain et al., CVPR 2025, arXiv 2411.16738)
    e = u + g delta
    m = P x + Q e
    x = A x + B m + sum_j H_j history[j] + N noise             history[STORE] = m
    model_input = S_next x                                     timestep_out = TIMESTEP_next,  state[b, STEP] = k + 1

Rows are filled by `fastguard.schedule`, rules, guidance and the first state by `fastguard.policy`; `layout` names the columns.

Numbers: d, e, m and x are float32 whatever the model's dtype; decisions are float64 scalars of the float32 d. d is summed in an
order that depends on the latent's size (and memory format) alone, and every elementwise result is rounded the same way wherever
the sample lies, so a sample's bits do not depend on its batch. A sample whose row has ACTIVE = 0 is not touched at all.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import codes, layout
from .layout import Row, Rule, State

try:
    import triton
    import triton.language as tl
except ImportError:  # not on every platform; the twin needs none
    triton = tl = None

BACKENDS = ("torch", "triton", "compiled")
PART = 16384  # the twin sums d in parts of PART elements: below torch's grain of 32,768, under which a sum is never split by threads


def guided_step(
    uncond: Tensor,
    cond: Tensor | None,
    *,
    x: Tensor,
    history: Tensor,
    model_input: Tensor | None,
    trace: Tensor,
    state: Tensor,
    rows: Tensor,
    rules: Tensor,
    guidance: Tensor,
    noise: Tensor | None = None,
    timestep_out: Tensor | None = None,
    scratch: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Run one step of the module's formula in place; changes x, history, model_input, trace, state, timestep_out and scratch.

    Args:
        uncond, cond: denoiser outputs u and c, [B, C, *S], float16 | bfloat16 | float32, any batch stride. cond = None: only one
            branch ran, it is passed as `uncond`, then e = u and trace[k, b] = NaN.
        x: latents, float32 [B, C, *S], contiguous or channels_last.
        history: float32 [L, B, C, *S], L = 0 to 3 slots, each in x's memory format.
        model_input: next denoiser input, [B or 2B, C, *S] in x's memory format, any of the three dtypes; None: not written.
        trace: float32 [>= steps, B], d of every step.
        state, rows, rules: float64 [B, len(State)], [R, len(Row)], [B, len(Rule)].
        guidance: float32 [B, >= steps, 2], g before the transition and after it.
        noise: [B, C, *S] of any of the three dtypes, read where N != 0.
        timestep_out: [B or 2B], any number dtype, the next row's timestep.
        scratch: workspace from `scratch_for(x)`, reused between calls; None: allocated by this call.
        backend: "triton", "torch" or "compiled" (see `compiled.py`: CPU, needs a C compiler); None: triton on CUDA and ROCm, torch
            elsewhere, unless the environment variable FASTGUARD_BACKEND names one.

    Raises:
        ValueError: a shape, dtype or memory format other than the above.
    """
    _check(uncond, cond, x, history, model_input, trace, state, rows, rules, guidance, noise, timestep_out)
    arguments = (
        uncond, cond, x, history, model_input, trace, state, rows, rules, guidance, noise, timestep_out, scratch, choose_backend(x, backend)
    )  # fmt: skip
    # The dispatcher costs this many arguments 45 us a call (stock's whole step on 8 small latents: 280 us), so it is only used where
    # somebody is watching: a compiler, FakeTensor, any other mode or subclass.
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        torch.ops.fastguard.guided_step.default(*arguments)
    else:
        _run(*arguments)


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """The one place that chooses: the argument, else FASTGUARD_BACKEND, else the device."""
    backend = backend or os.environ.get("FASTGUARD_BACKEND")
    if backend is None:
        return "triton" if x.device.type == "cuda" else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    return backend


def scratch_for(x: Tensor) -> Tensor:
    """Workspace that `guided_step` can reuse for every step on latents like x: float32, one dimension, contents irrelevant."""
    size = x.numel() // x.shape[0]
    return x.new_empty(x.shape[0] * max(2 * _width(size), 2 * len(State) + -(-2 * size // BLOCK)))


def history_for(x: Tensor, slots: int) -> Tensor:
    """[slots, *x.shape] zeros, every slot in x's memory format."""
    return torch.empty_strided(
        (slots, *x.shape), (x.numel(), *x.stride()), dtype=torch.float32, device=x.device
    ).zero_()


def decide(where, state, rule, row, d, both):  # no annotations: Triton would compile them
    """State machine of one step: (state, rule, row, d) -> (new state, whether guidance[b, k, 0] applies).

    The only definition of the decisions. It runs on Python floats, torch columns and Triton scalars alike: `where` is the select
    of that world, the sequences are indexed by `layout`'s columns, and all is float64, so every world decides the same.
    `both` (a Python bool) = both branches ran, so d is known. A NaN compares false: it never fires a rule nor raises a maximum.
    """
    (
        k,
        base,
        phase,
        j,
        last,
        before_last,
        maximum,
        last_row,
        transition,
        minimum,
        margin,
        gate_step,
        gate_d,
        forced,
        non_finite,
    ) = state
    (kind, switch_row, gate, gate_steps, min_step, floor, rho, magnitude) = rule
    if both:
        non_finite = where(((d - d) != 0) & (non_finite < 0), k, non_finite)
        observe = row[codes.OBSERVE] != 0
        weight = where(magnitude == codes.EPSILON, row[codes.W_EPSILON], row[codes.W_X0])
        statistic = d * where(magnitude == codes.OUTPUT, 1.0, weight)

        looking = observe & (phase == codes.UNDECIDED) & (j < gate_steps)
        caught = looking & (d >= gate)
        gate_d = where(looking & (d > gate_d), d, gate_d)
        gate_step = where(caught, k, gate_step)
        phase = where(looking & (j + 1 >= gate_steps), codes.PLAIN, phase)
        phase = where(caught, codes.BEFORE, phase)

        guarded = observe & (phase == codes.BEFORE)
        dip = (j >= 2) & (last < before_last) & (last < statistic) & (j - 1 >= min_step) & (last < floor * maximum)
        dip = guarded & (kind == codes.MINIMUM) & dip
        neighbour = where(before_last < statistic, before_last, statistic)
        peak = where(statistic > maximum, statistic, maximum)
        drop = guarded & (kind == codes.DROP) & (j >= min_step) & (statistic < rho * peak)
        minimum = where(dip, last_row, minimum)
        # Where a rule fired its denominator is positive; elsewhere it may be 0, at which Python raises, hence the 1.
        margin = where(dip, 1.0 - last / where(dip, neighbour, 1.0), margin)
        margin = where(drop, 1.0 - statistic / where(drop, rho * peak, 1.0), margin)
        transition = where(dip | drop, k, transition)
        phase = where(dip | drop, codes.AFTER, phase)

        before_last = where(observe, last, before_last)
        last = where(observe, statistic, last)
        maximum = where(observe, peak, maximum)
        last_row = where(observe, k, last_row)
        j = where(observe, j + 1, j)

    switched = (phase == codes.BEFORE) & (k >= switch_row)
    transition = where(switched, k, transition)
    forced = where(switched & (kind != codes.NONE), 1.0, forced)
    phase = where(switched, codes.AFTER, phase)
    state = (
        k + 1,
        base,
        phase,
        j,
        last,
        before_last,
        maximum,
        last_row,
        transition,
        minimum,
        margin,
        gate_step,
        gate_d,
        forced,
        non_finite,
    )
    return state, phase == codes.BEFORE


# ------------------------------------------------------------------------------------------------------------ plain torch
def guided_step_torch(
    uncond: Tensor,
    cond: Tensor | None,
    x: Tensor,
    history: Tensor,
    model_input: Tensor | None,
    trace: Tensor,
    state: Tensor,
    rows: Tensor,
    rules: Tensor,
    guidance: Tensor,
    noise: Tensor | None = None,
    timestep_out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """`guided_step` in plain torch, for the CPU and devices without Triton (there it synchronises with the host).

    Every tensor operation rounds once (no addcmul, no alpha): torch's kernels may use a fused multiply-add in their vectorised
    body and not in its tail, and which of the two an element meets depends on the batch.
    """
    batch, size = x.shape[0], x.numel() // x.shape[0]
    width = _width(size)
    scratch = scratch_for(x) if scratch is None else scratch
    delta, work = (scratch.as_strided((batch, width), (width, 1), start) for start in (0, batch * width))
    u, latents, e = _flat(uncond, size), _flat(x, size), delta
    if width > size:
        delta[:, size:].zero_()
        e = delta[:, :size]
    if cond is None:
        e.copy_(u)
        d = [math.nan] * batch
    else:
        c = _flat(cond, size)
        if c.dtype == torch.float32:
            torch.sub(c, u, out=e)
        else:  # torch subtracts in the inputs' dtype, d is defined on values cast to float32
            e.copy_(c).sub_(u)
        torch.mul(delta, delta, out=work)
        parts = work if width <= PART else work.view(batch, -1, PART).sum(2)
        # Of all operations on just 32,768 elements (8 small latents) torch starts threads for the sum alone; it is not worth it.
        split = parts.numel() == 2 * PART and torch.get_num_threads() > 1
        halves = parts.chunk(2) if split else (parts,)
        d = [value for half in halves for value in half.sum(1).tolist()]

    on_host = x.device.type == "cpu"
    tables = (state, trace, rows, rules, guidance)
    host = [t.numpy() if on_host else t.cpu().numpy() for t in tables]  # on the CPU these are views
    plan = _decide_on_host(d, cond is not None, *host)
    if not on_host:
        state.copy_(torch.from_numpy(host[0]))
        trace.copy_(torch.from_numpy(host[1]))

    slots = [_flat(slot, size) for slot in history.unbind()]
    z = None if noise is None else _flat(noise, size)
    y = None if model_input is None else _flat(model_input, size).view(-1, batch, size)
    times = None if timestep_out is None else timestep_out.view(-1, batch)
    for form, run in _runs(plan.forms):
        whole = (
            run.stop - run.start == batch
        )  # nearly always, and seven slices cost as much as two passes over small latents

        def part(tensor: Tensor, dim: int = 0, whole: bool = whole, run: slice = run) -> Tensor:
            return tensor if whole else tensor.narrow(dim, run.start, run.stop - run.start)

        table = torch.from_numpy(plan.table[:, run])
        g, *values, scale = (table if on_host else table.to(x.device)).unbind()
        p, q, a, b, *h, n = map(_Term, form.kinds, values)
        m, latent, product = part(e), part(latents), part(work if width == size else work[:, :size])
        if cond is not None:
            m.mul_(g).add_(part(u))
        q.multiply(m)
        p.add_to(m, latent, product)
        a.multiply(latent)
        b.add_to(latent, m, product)
        for term, slot in zip(h, slots, strict=False):  # three terms, as many slots as there are
            term.add_to(latent, part(slot), product)
        if z is not None:
            n.add_to(latent, part(z), product)
        if form.store >= 0:
            part(slots[form.store]).copy_(m)
        if y is not None:
            source = latent if form.unscaled else torch.mul(latent, scale, out=product)
            # One copy into both halves, unless torch would start threads for it alone (as for the sum above).
            for target in (part(y, 1),) if torch.get_num_threads() == 1 or batch * size != 2 * PART else map(part, y):
                target.copy_(source)
        if times is not None:
            part(times, 1).copy_(torch.from_numpy(plan.times[run]))


class _Form(NamedTuple):
    """What a row makes the tensor program look like; neighbours in the batch with equal forms run together."""

    kinds: tuple[float | None, ...]  # of P, Q, A, B, H0 to H2, N: 0.0, 1.0 or None for any other value
    store: int
    unscaled: bool  # S of the next row is 1


class _HostPlan(NamedTuple):
    forms: list[_Form | None]  # per sample; None: inactive
    table: np.ndarray  # float32 [10, B, 1]: g, P, Q, A, B, H0 to H2, N, S of the next row
    times: np.ndarray  # float64 [B]: timestep of the next row


def _decide_on_host(
    d: list[float],
    both: bool,
    state: np.ndarray,
    trace: np.ndarray,
    rows: np.ndarray,
    rules: np.ndarray,
    guidance: np.ndarray,
) -> _HostPlan:
    """`decide` for every sample on Python floats; updates state and trace. A tensor operation on B numbers costs 1 to 2 us and
    `decide` has 60, a sample on Python floats costs 2 us."""
    forms: list[_Form | None] = []
    known: dict[int, tuple[list[float], _Form | None]] = {}
    run, states, r, k, column = _scalar_decide(), state.tolist(), [], [], []
    last = -1
    for b, rule in enumerate(rules.tolist()):
        old = states[b]
        step = int(old[0])
        at = step + int(old[1])
        if at != last:  # as a rule all samples are at the same row
            if at not in known:
                row = rows[at].tolist()
                known[at] = row, _form(row, rows[at + 1, codes.S]) if row[codes.ACTIVE] else None
            (row, form), last = known[at], at
        before = False
        if form is not None:
            states[b], before = run(None, old, rule, row, d[b], both)
            trace[step, b] = d[b]
        else:
            step = 0  # there may be no guidance for it
        forms.append(form)
        r.append(at)
        k.append(step)
        column.append(0 if before else 1)
    state[:] = states

    table = np.empty((10, len(forms), 1), dtype=np.float32)
    if len(known) == 1 and k.count(step) == len(k):
        table[0, :, 0] = [pair[i] for pair, i in zip(guidance[:, step].tolist(), column, strict=True)]
        following = rows[min(at + 1, len(rows) - 1)].tolist()
        table[1:9] = rows[at, codes.P : codes.N + 1, None, None]
        times = np.full(len(forms), following[codes.TIMESTEP])
    else:
        table[0, :, 0] = guidance[range(len(forms)), k, column]
        following = rows[np.minimum(np.array(r) + 1, len(rows) - 1)].T
        table[1:9, :, 0] = rows[r, codes.P : codes.N + 1].T
        times = following[codes.TIMESTEP]
    table[9, :, 0] = following[codes.S]
    return _HostPlan(forms, table, times)


def _form(row: list[float], scale: float) -> _Form:
    kinds = tuple([value if value == 0.0 or value == 1.0 else None for value in row[codes.P : codes.N + 1]])
    return _Form(kinds, int(row[codes.STORE]), scale == 1.0)


def _runs(forms: list[_Form | None]) -> Iterator[tuple[_Form, slice]]:
    """Neighbours of equal form, without the inactive."""
    start = 0
    for form, group in groupby(forms):
        stop = start + len(list(group))
        if form is not None:
            yield form, slice(start, stop)
        start = stop


class _Term(NamedTuple):
    """A coefficient column; products with 0 are skipped (what they would read may hold NaN), those with 1 are exact anyway."""

    kind: float | None
    value: Tensor

    def multiply(self, tensor: Tensor) -> None:
        if self.kind is None:
            tensor.mul_(self.value)
        elif self.kind == 0.0:
            tensor.zero_()

    def add_to(self, total: Tensor, tensor: Tensor, product: Tensor) -> None:
        if self.kind is None:
            torch.mul(tensor, self.value, out=product)
            total.add_(product)
        elif self.kind == 1.0:
            total.add_(tensor)


class _Inline(ast.NodeTransformer):
    """where(c, a, b) -> (a if c else b), & -> and, | -> or, codes.NAME -> its number."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        condition, yes, no = (self.visit(argument) for argument in node.args)
        return ast.IfExp(condition, yes, no)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        operands = [self.visit(node.left), self.visit(node.right)]
        if isinstance(node.op, ast.BitAnd | ast.BitOr):
            return ast.BoolOp(ast.And() if isinstance(node.op, ast.BitAnd) else ast.Or(), operands)
        return ast.BinOp(operands[0], node.op, operands[1])

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Constant(getattr(codes, node.attr))


@lru_cache(maxsize=1)
def _scalar_decide() -> Callable[..., Any]:
    """`decide` for Python floats. Calls of a `where` and operands that need no looking at are half of its time there."""
    tree = ast.fix_missing_locations(_Inline().visit(ast.parse(inspect.getsource(decide))))
    namespace: dict[str, Any] = {}
    exec(compile(tree, "<decide>", "exec"), namespace)
    return namespace["decide"]


def _width(size: int) -> int:
    return size if size <= PART else -(-size // PART) * PART


def _flat(tensor: Tensor, size: int) -> Tensor:
    """[N, size] view of samples that are dense in memory, in memory order."""
    return tensor.as_strided((tensor.shape[0], size), (tensor.stride(0), 1))


# ----------------------------------------------------------------------------------------------------------------- Triton
# A latent of at most SINGLE elements is one program's work and takes one launch: SD 1.5's 4x64x64 takes an SM about as long as the
# second launch that it saves. A larger one is cut into blocks and takes two: partial sums first, then every program adds up its
# sample's partials in the same order and decides for itself. There the first launch copies the state and the second reads only
# that copy and writes only the state, so no program reads what another one of the same launch writes.
# All sizes depend on the latent's size alone: with it the order of the sum, and so the bits of d, would change.
SINGLE = 16384
SINGLE_BLOCK, SINGLE_THREADS = 4096, 512  # 8 elements per thread: one 16-byte access in float16, two in float32
BLOCK, THREADS = 2048, 256
PARTIALS = 128  # partial sums that one program adds up at a time


def _jit(function: Callable[..., Any]) -> Any:
    integers = ["n", "u_stride", "c_stride", "slot_stride", "slots", "steps", "y_halves", "t_halves"]
    present = [name for name in integers if name in function.__code__.co_varnames[: function.__code__.co_argcount]]
    return function if triton is None else triton.jit(function, do_not_specialize=present)


@_jit
def _where(condition, yes, no):
    return tl.where(condition, yes, no)


_decide = _jit(decide)


# Columns one by one: TileLens takes even a static_range for a loop at run time, and then knows no column's value.
@_jit
def _load_8(ptr):
    return (
        tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6),
        tl.load(ptr + 7),
    )  # fmt: skip


@_jit
def _load_15(ptr):
    return _load_8(ptr) + (  # noqa: RUF005 - Triton cannot unpack
        tl.load(ptr + 8), tl.load(ptr + 9), tl.load(ptr + 10), tl.load(ptr + 11), tl.load(ptr + 12), tl.load(ptr + 13),
        tl.load(ptr + 14),
    )  # fmt: skip


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
def _times(weight, values):
    """weight * values; under a weight of 0 a NaN stays behind, as in the twin."""
    weight = weight.to(tl.float32)
    return tl.where(weight != 0, weight * values, 0.0)


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
    u_ptr, c_ptr, x_ptr, history_ptr, y_ptr, z_ptr, start, n, slot_stride, y_stride, y_halves, g, row, scale,
    slots, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements start to start + BLOCK of one sample, to whose first element the pointers point."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < n
    e = tl.load(u_ptr + offs, mask, other=0.0).to(tl.float32)
    if c_ptr is not None:
        e += g * (tl.load(c_ptr + offs, mask, other=0.0).to(tl.float32) - e)
    x = tl.load(x_ptr + offs, mask, other=0.0)
    m = _times(row[codes.P], x) + _times(row[codes.Q], e)
    x = _times(row[codes.A], x) + _times(row[codes.B], m)
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
    u_ptr, c_ptr, state_ptr, snapshot_ptr, partials_ptr, n, u_stride, c_stride, UNIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Partial sums of d, one program per block and sample; the first block's copies the state."""
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    if part == 0:
        columns = tl.arange(0, 16)
        at = b * codes.STATE_WIDTH + columns
        mask = columns < codes.STATE_WIDTH
        tl.store(snapshot_ptr + at, tl.load(state_ptr + at, mask, other=0.0), mask)
    if c_ptr is not None:
        squares = _squares(u_ptr + b * u_stride * UNIT, c_ptr + b * c_stride * UNIT, part * BLOCK, n * UNIT, BLOCK)
        tl.store(partials_ptr + b * tl.num_programs(0) + part, tl.sum(squares))


@_jit
def _step_kernel(
    u_ptr, c_ptr, x_ptr, history_ptr, y_ptr, trace_ptr, state_ptr, rows_ptr, rules_ptr, guidance_ptr, z_ptr, times_ptr,
    snapshot_ptr, partials_ptr,
    n, u_stride, c_stride, slot_stride, slots, steps, y_halves, t_halves,
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
    first = tl.program_id(0) * BLOCK
    end = n if snapshot_ptr is None else first + BLOCK
    state = _load_15((state_ptr if snapshot_ptr is None else snapshot_ptr) + b * codes.STATE_WIDTH)
    k = state[codes.STEP].to(tl.int64)
    rows_ptr += (k + state[codes.BASE].to(tl.int64)) * codes.ROW_WIDTH
    row = _load_15(rows_ptr)
    if row[codes.ACTIVE] != 0:
        if c_ptr is None:
            d = tl.full([], float("nan"), tl.float32)
        elif snapshot_ptr is None:
            squares = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n, BLOCK):
                squares += _squares(u_ptr, c_ptr, start, n, BLOCK)
            d = tl.sum(squares)
        else:
            sums = tl.zeros([PARTIALS], tl.float32)
            parts = tl.num_programs(0)
            for start in range(0, parts, PARTIALS):
                offs = start + tl.arange(0, PARTIALS)
                sums += tl.load(partials_ptr + b * parts + offs, offs < parts, other=0.0)
            d = tl.sum(sums)
        rule = _load_8(rules_ptr + b * codes.RULE_WIDTH)
        new_state, before = _decide(_where, state, rule, row, d.to(tl.float64), c_ptr is not None)
        next_row_ptr = rows_ptr + codes.ROW_WIDTH
        if first == 0:
            tl.debug_barrier()  # every thread has read the state that is overwritten here
            _store_state(state_ptr + b * codes.STATE_WIDTH, new_state)
            tl.store(trace_ptr + k * batch + b, d)
            if times_ptr is not None:
                time = tl.load(next_row_ptr + codes.TIMESTEP)
                tl.store(times_ptr + b, time)
                if t_halves > 1:
                    tl.store(times_ptr + batch + b, time)
        row = _load_15(rows_ptr)  # again: held across the decision, 15 doubles would spill on gfx942
        scale = tl.load(next_row_ptr + codes.S)
        guidance_ptr += (b * steps + k) * 2
        g = tl.where(before, tl.load(guidance_ptr), tl.load(guidance_ptr + 1))
        for start in range(first, end, BLOCK):
            _advance(
                u_ptr, c_ptr, x_ptr + b * n, history_ptr + b * n, None if y_ptr is None else y_ptr + b * n,
                None if z_ptr is None else z_ptr + b * n, start, n, slot_stride.to(tl.int64) * UNIT, batch * n.to(tl.int64), y_halves,
                g, row, scale, slots, BLOCK,
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


def _guided_step_triton(
    u: Tensor,
    c: Tensor | None,
    x: Tensor,
    history: Tensor,
    model_input: Tensor | None,
    trace: Tensor,
    state: Tensor,
    rows: Tensor,
    rules: Tensor,
    guidance: Tensor,
    z: Tensor | None,
    timestep_out: Tensor | None,
    scratch: Tensor | None,
) -> None:
    batch = x.shape[0]
    size = x.numel() // batch
    latents = [t for t in (u, c, x, history, model_input, z) if t is not None]
    strides = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in (u, c, history)]
    aligned = all(number % 16 == 0 for number in (size, *strides)) and all(t.data_ptr() % 16 == 0 for t in latents)
    unit = 16 if aligned else 1
    n, u_stride, c_stride, slot_stride = (number // unit for number in (size, *strides))
    block, parts, options = launch_shape(size, aligned)
    snapshot = partials = None
    if parts > 1:
        scratch = scratch_for(x) if scratch is None else scratch
        snapshot = scratch[: 2 * state.numel()].view(torch.float64)
        partials = scratch[2 * state.numel() :]
        _norm_kernel[(parts, batch)](
            u, c, state, snapshot, partials, n, u_stride, c_stride, UNIT=unit, BLOCK=block, **options
        )  # fmt: skip
    _step_kernel[(parts, batch)](
        u, c, x, history, model_input, trace, state, rows, rules, guidance, z, timestep_out, snapshot, partials,
        n, u_stride, c_stride, slot_stride, history.shape[0], guidance.shape[1],
        0 if model_input is None else model_input.shape[0] // batch,
        0 if timestep_out is None else timestep_out.shape[0] // batch,
        UNIT=unit, BLOCK=block, PARTIALS=PARTIALS, **options,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- operator
def _run(
    uncond: Tensor,
    cond: Tensor | None,
    x: Tensor,
    history: Tensor,
    model_input: Tensor | None,
    trace: Tensor,
    state: Tensor,
    rows: Tensor,
    rules: Tensor,
    guidance: Tensor,
    noise: Tensor | None,
    timestep_out: Tensor | None,
    scratch: Tensor | None,
    backend: str,
) -> None:
    if uncond.requires_grad or (cond is not None and cond.requires_grad):
        uncond, cond = uncond.detach(), None if cond is None else cond.detach()
    uncond = _like(uncond, x)
    cond = None if cond is None else _like(cond, x)
    noise = noise if noise is None or _dense_like(noise, x) else _like(noise.contiguous(), x)
    buffers = (x, history, model_input, trace, state, rows, rules, guidance, noise, timestep_out, scratch)
    if backend == "triton":
        _guided_step_triton(uncond, cond, *buffers)
    elif backend == "torch":
        guided_step_torch(uncond, cond, *buffers)
    else:
        from .compiled import guided_step_compiled

        guided_step_compiled(uncond, cond, *buffers)


def _fake(*_: Any) -> None:
    """Nothing is returned and no shape depends on data, so FakeTensor, torch.compile and export see one node."""


_library = torch.library.Library("fastguard", "FRAGMENT")
_library.define(
    "guided_step(Tensor uncond, Tensor? cond, Tensor(a!) x, Tensor(b!) history, Tensor(c!)? model_input, Tensor(d!) trace, "
    "Tensor(e!) state, Tensor rows, Tensor rules, Tensor guidance, Tensor? noise, Tensor(f!)? timestep_out, Tensor(g!)? scratch, "
    "str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("guided_step", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastguard::guided_step", _fake, lib=_library)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """tensor itself if its samples lie in memory as x's do, else a copy that does (a model that answers in another format)."""
    if tensor.stride()[1:] == x.stride()[1:] or _strides(tensor) == _strides(x):
        return tensor
    return torch.empty_strided(x.shape, x.stride(), dtype=tensor.dtype, device=x.device).copy_(tensor)


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1]


def _dense_like(tensor: Tensor, x: Tensor) -> bool:
    if tensor.stride() == x.stride():
        return True
    return _strides(tensor) == _strides(x) and (tensor.shape[0] == 1 or tensor.stride(0) == x.numel() // x.shape[0])


def _check(
    uncond: Tensor,
    cond: Tensor | None,
    x: Tensor,
    history: Tensor,
    model_input: Tensor | None,
    trace: Tensor,
    state: Tensor,
    rows: Tensor,
    rules: Tensor,
    guidance: Tensor,
    noise: Tensor | None,
    timestep_out: Tensor | None,
) -> None:
    shape, batch = x.shape, x.shape[0]
    batches = (batch, 2 * batch)
    if (
        x.dtype != torch.float32
        or not x.numel()
        or not (x.is_contiguous() or x.is_contiguous(memory_format=_LAST.get(x.dim(), torch.contiguous_format)))
    ):
        _refuse("x", x, "float32 [B, C, *S], not empty, contiguous or channels_last")
    for name, tensor in (("uncond", uncond), ("cond", cond), ("noise", noise)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in _FLOATS):
            _refuse(name, tensor, f"float16, bfloat16 or float32 {list(shape)} as x")
    if cond is not None and cond.dtype != uncond.dtype:
        _refuse("cond", cond, f"uncond's dtype {uncond.dtype}")
    slots = history.shape[0]
    if (
        history.dtype != torch.float32
        or history.shape[1:] != shape
        or slots > layout.HISTORY
        or (slots and history.stride()[1:] != x.stride() and not _dense_like(history[0], x))
    ):
        _refuse(
            "history", history, f"float32 [0 to {layout.HISTORY}, *{list(shape)}] in x's memory format, see history_for"
        )
    if model_input is not None and (
        model_input.shape[0] not in batches
        or model_input.shape[1:] != shape[1:]
        or model_input.dtype not in _FLOATS
        or not _dense_like(model_input, x)
    ):
        _refuse(
            "model_input",
            model_input,
            f"float16, bfloat16 or float32 [B or 2B, *{list(shape[1:])}] in x's memory format",
        )
    if trace.dtype != torch.float32 or trace.dim() != 2 or trace.shape[1] != batch or not trace.is_contiguous():
        _refuse("trace", trace, f"contiguous float32 [steps, {batch}]")
    if state.dtype != torch.float64 or state.shape != (batch, len(State)) or not state.is_contiguous():
        _refuse("state", state, f"contiguous float64 [{batch}, {len(State)}]")
    if rules.dtype != torch.float64 or rules.shape != (batch, len(Rule)) or not rules.is_contiguous():
        _refuse("rules", rules, f"contiguous float64 [{batch}, {len(Rule)}]")
    if rows.dtype != torch.float64 or rows.dim() != 2 or rows.shape[1] != len(Row) or not rows.is_contiguous():
        _refuse("rows", rows, f"contiguous float64 [rows, {len(Row)}]")
    if (
        guidance.dtype != torch.float32
        or guidance.dim() != 3
        or guidance.shape[::2] != (batch, 2)
        or not guidance.is_contiguous()
    ):
        _refuse("guidance", guidance, f"contiguous float32 [{batch}, steps, 2]")
    if timestep_out is not None and (
        timestep_out.dim() != 1 or timestep_out.shape[0] not in batches or not timestep_out.is_contiguous()
    ):
        _refuse("timestep_out", timestep_out, f"contiguous [{batch}] or [{2 * batch}]")


def _refuse(name: str, tensor: Tensor, allowed: str) -> NoReturn:
    raise ValueError(
        f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}; allowed: {allowed}"
    )
