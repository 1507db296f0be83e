"""`guided_step` in plain torch: the CPU's backend, and what the others are compared with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import codes
from .anchor import push
from .arguments import Operands
from .decide import decide

PART = 16384  # d is summed in parts of PART elements: below torch's grain of 32,768, under which a sum is never split by threads


def guided_step_torch(operands: Operands) -> None:
    """`guided_step` in plain torch, for the CPU and devices without Triton (there it synchronises with the host).

    Every tensor operation rounds once (no addcmul, no alpha): torch's kernels may use a fused multiply-add in their vectorised
    body and not in its tail, and which of the two an element meets depends on the batch.
    """
    u, c, own, x, history, model_input, trace, state, rows, rules, guidance, noise = operands[:12]
    timestep_out, anchor, shares, scratch = operands[12:]
    assert scratch is not None
    batch, size = x.shape[0], x.numel() // x.shape[0]
    padded = width(size)
    delta, work = (scratch.as_strided((batch, padded), (padded, 1), start) for start in (0, batch * padded))
    u, latents, e = _flat(u, size), _flat(x, size), delta
    if padded > size:
        delta[:, size:].zero_()
        e = delta[:, :size]
    if c is None:
        e.copy_(u)
        d = [math.nan] * batch
    else:
        c = _flat(c, size)
        if c.dtype == torch.float32:
            torch.sub(c, u, out=e)
        else:  # torch subtracts in the inputs' dtype, d is defined on values cast to float32
            e.copy_(c).sub_(u)
        d = _sums(torch.mul(delta, delta, out=work))

    on_host = x.device.type == "cpu"
    own = None if own is None else _flat(own, size)
    held = None if anchor is None or c is None else _held(anchor, u, c, own, latents, e, state, rows, size)
    tables = (state, trace, rows, rules, guidance)
    host = [t.numpy() if on_host else t.cpu().numpy() for t in tables]  # on the CPU these are views
    pasts = None if shares is None else shares.numpy() if on_host else shares.cpu().numpy()
    plan = _decide_on_host(d, c is not None, own is not None, held, pasts, *host)
    if not on_host:
        state.copy_(torch.from_numpy(host[0]))
        trace.copy_(torch.from_numpy(host[1]))
        if shares is not None:
            shares.copy_(torch.from_numpy(pasts))

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
        g, *values, scale, f = (table if on_host else table.to(x.device)).unbind()
        p, q, a, b, *h, n = map(_Term, form.kinds, values)
        m, latent, product = part(e), part(latents), part(work if padded == size else work[:, :size])
        if own is not None and form.combined:
            m.copy_(part(own))
        elif c is not None:
            m.mul_(g).add_(part(u))
        if held is not None and form.pushed:
            m.sub_(torch.mul(part(held.a), f, out=product))
        if held is not None and form.written:
            for half, fresh in zip(held.anchor, held.fresh, strict=True):
                part(half).copy_(part(fresh))
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
    combined: bool = False  # e is the caller's own combination
    pushed: bool = False  # f is not 0
    written: bool = False  # the anchor is


class _Held(NamedTuple):
    """Anchored guidance of a row, before it is decided."""

    a: Tensor  # [B, size]: m - x0(u)
    sums: list[tuple[float, ...]]  # per sample, as `anchor.push` takes them
    anchor: tuple[Tensor, Tensor]  # m and mu, [B, size] each
    fresh: tuple[Tensor, ...]  # x0(c) and x0(u)


def _held(
    anchor: Tensor,
    u: Tensor,
    c: Tensor,
    own: Tensor | None,
    x: Tensor,
    delta: Tensor,
    state: Tensor,
    rows: Tensor,
    size: int,
) -> _Held:
    """a and the sums over it; of a sample whose anchor is not written yet, with the one that this row would write."""
    row = rows[(state[:, codes.BASE] + state[:, codes.STEP]).long()]
    on_x, on_e = (row[:, column, None].float() for column in (codes.X, codes.E))
    fresh = tuple(x.mul(on_x).add_(output.to(torch.float32, copy=True).mul_(on_e)) for output in (c, u))
    m, mu = _flat(anchor[0], size), _flat(anchor[1], size)
    first = state[:, codes.ANCHOR, None] == codes.UNWRITTEN
    a = torch.where(first, delta.mul(on_e), m.sub(fresh[1]))
    spread = fresh[1].sub(mu).square_().add_(m.sub(mu).square_())
    beside = torch.zeros_like(a) if own is None else own.to(torch.float32, copy=True).sub_(u).mul_(a)
    products = (a.square(), delta.mul(a), torch.where(first, 0.0, spread), beside)
    return _Held(a, list(zip(*(_sums(_padded(one)) for one in products), strict=True)), (m, mu), fresh)


def _sums(products: Tensor) -> list[float]:
    """Per sample the sum of its [B, padded] products, in an order that depends on their number alone."""
    parts = products if products.shape[1] <= PART else products.view(len(products), -1, PART).sum(2)
    # Of all operations on just 32,768 elements (8 small latents) torch starts threads for the sum alone; it is not worth it.
    split = parts.numel() == 2 * PART and torch.get_num_threads() > 1
    halves = parts.chunk(2) if split else (parts,)
    return [value for half in halves for value in half.sum(1).tolist()]


def _padded(products: Tensor) -> Tensor:
    size = products.shape[1]
    return products if width(size) == size else torch.nn.functional.pad(products, (0, width(size) - size))


class _HostPlan(NamedTuple):
    forms: list[_Form | None]  # per sample; None: inactive
    table: np.ndarray  # float32 [11, B, 1]: g, P, Q, A, B, H0 to H2, N, S of the next row, f
    times: np.ndarray  # float64 [B]: timestep of the next row


def _decide_on_host(
    d: list[float],
    both: bool,
    combines: bool,
    held: _Held | None,
    shares: np.ndarray | None,
    state: np.ndarray,
    trace: np.ndarray,
    rows: np.ndarray,
    rules: np.ndarray,
    guidance: np.ndarray,
) -> _HostPlan:
    """`decide` for every sample on Python floats; updates state and trace. A tensor operation on B numbers costs 1 to 2 us and
    `decide` has 60, a sample on Python floats costs a few."""
    forms: list[_Form | None] = []
    known: dict[int, tuple[list[float], _Form | None]] = {}
    states, r, numbers = state.tolist(), [], []
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
        g = f = 0.0
        if form is not None:
            new, before, combined = decide(_where, old[: codes.DECIDED], rule[: codes.RULED], row, d[b], both)
            g, share = float(guidance[b, step, 0 if before else 1]), math.nan
            tail = [new[codes.NON_FINITE], *old[codes.DECIDED :]]
            if held is not None and rule[codes.ANCHORED]:
                tail, share, f, g, combined = push(
                    _where, math.sqrt, tail, new[codes.PHASE], step, rule[codes.RULED :], row, held.sums[b], g, float(combined and combines)
                )  # fmt: skip
            states[b] = [*new[: codes.NON_FINITE], *tail]
            trace[step, b] = d[b]
            if shares is not None:
                shares[step, b] = share
            fresh = (
                held is not None
                and rule[codes.ANCHORED]
                and old[codes.ANCHOR] == codes.UNWRITTEN
                and old[codes.PHASE] != codes.PLAIN
            )
            if (combined and combines) or f or fresh:
                form = form._replace(combined=bool(combined and combines), pushed=f != 0.0, written=bool(fresh))
                last = -1  # the next sample has a form of its own
        forms.append(form)
        r.append(at)
        numbers.append((g, f))
    state[:] = states

    table = np.empty((11, len(forms), 1), dtype=np.float32)
    table[[0, 10], :, 0] = np.array(numbers).T
    if len(known) == 1:
        following = rows[min(at + 1, len(rows) - 1)].tolist()
        table[1:9] = rows[at, codes.P : codes.N + 1, None, None]
        times = np.full(len(forms), following[codes.TIMESTEP])
    else:
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
            tensor.fill_(-0.0)  # the neutral element of a sum: 0 + -0 would lose the sign

    def add_to(self, total: Tensor, tensor: Tensor, product: Tensor) -> None:
        if self.kind is None:
            torch.mul(tensor, self.value, out=product)
            total.add_(product)
        elif self.kind == 1.0:
            total.add_(tensor)


def _where(condition: bool, yes: Any, no: Any) -> Any:
    return yes if condition else no


def width(size: int) -> int:
    """Elements that a sample of `size` takes in the workspace: whole parts."""
    return size if size <= PART else -(-size // PART) * PART


def _flat(tensor: Tensor, size: int) -> Tensor:
    """[N, size] view of samples that are dense in memory, in memory order."""
    return tensor.as_strided((tensor.shape[0], size), (tensor.stride(0), 1))
