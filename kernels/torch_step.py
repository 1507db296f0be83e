"""`guided_step` in plain torch, one sample after the other: the CPU's backend, and what the other is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import codes
from .anchor import push
from .arguments import Operands
from .decide import decide

PART = 16384  # a sum is made of parts of PART elements: below torch's grain of 32,768, under which it is never split by threads


def guided_step_torch(o: Operands) -> None:
    """`guided_step` in plain torch, for the CPU and devices without Triton (there it synchronises with the host).

    Every tensor operation rounds once (no addcmul, no alpha): torch's kernels may use a fused multiply-add in their vectorised
    body and not in its tail.
    """
    batch, size = len(o.x), o.x.numel() // len(o.x)
    written = [t for t in (o.state, o.trace, o.shares) if t is not None]
    host = [t.cpu().numpy() for t in written]  # on the CPU these are views
    (state, trace, *shares), rows, guidance = host, o.rows.cpu().numpy(), o.guidance.cpu().numpy()
    latents = [_samples(t, size, batch) for t in (o.uncond, o.cond, o.combined, o.x, o.noise)]
    slots = [_samples(slot, size, batch) for slot in o.history]
    inputs = None if o.model_input is None else _flat(o.model_input, size).view(-1, batch, size).unbind(1)
    times = None if o.timestep_out is None else o.timestep_out.view(-1, batch).unbind(1)
    anchors = [] if o.anchor is None or o.cond is None else [_samples(half, size, batch) for half in o.anchor]

    for b, (old, rule, u, c, own, x, z) in enumerate(zip(state.tolist(), o.rules.tolist(), *latents, strict=True)):
        k = int(old[codes.STEP])
        at = k + int(old[codes.BASE])
        row = rows[at].tolist()
        if not row[codes.ACTIVE]:
            continue
        following = rows[at + 1].tolist()
        delta: Any = None if c is None else c.float() - u
        d = math.nan if c is None else _sum(delta * delta)
        new, before, combines = decide(_where, old[: codes.DECIDED], rule[: codes.RULED], row, d, c is not None)
        g, f, share = float(guidance[b, k, 0 if before else 1]), 0.0, math.nan
        combines = 0.0 if own is None else combines
        tail = [new[codes.NON_FINITE], *old[codes.DECIDED :]]
        if anchors and rule[codes.ANCHORED]:
            first_c, first_u = (half[b] for half in anchors)  # m and mu of `push`
            c0, u0 = (x * row[codes.X] + output.float() * row[codes.E] for output in (c, u))
            first = old[codes.ANCHOR] == codes.UNWRITTEN
            a = delta * row[codes.E] if first else first_c - u0
            spread = 0.0 if first else _sum((u0 - first_u).square() + (first_c - first_u).square())
            w = None if own is None else own.float() - u
            beside = (0.0, 0.0) if w is None else (_sum(w * a), _sum(w.square()))
            sums = (d, _sum(a.square()), _sum(delta * a), spread, *beside)
            tail, share, f, g, combines = push(
                _where, math.sqrt, tail, new[codes.PHASE], k, rule[codes.RULED :], row, sums, g, combines
            )
            if first and old[codes.PHASE] != codes.PLAIN:
                first_c.copy_(c0)
                first_u.copy_(u0)
        state[b] = [*new[: codes.NON_FINITE], *tail]
        trace[k, b] = d
        for table in shares:
            table[k, b] = share

        e = u.float() if c is None else delta * g + u
        if combines:
            e = own.float() if combines == 1 else (own.float() - u) * combines + u
        e = e - a * f if f else e  # only an anchored sample has an f
        m = e if (row[codes.Q], row[codes.P]) == (1.0, 0.0) else _weighted((row[codes.Q], e), (row[codes.P], x))
        past = [(row[codes.H0 + j], slot[b]) for j, slot in enumerate(slots)]
        after = _weighted((row[codes.A], x), (row[codes.B], m), *past, (0.0 if z is None else row[codes.N], z))
        if row[codes.STORE] >= 0:
            slots[int(row[codes.STORE])][b].copy_(m)
        x.copy_(after)
        if inputs is not None:  # one or both halves
            inputs[b].copy_(after if following[codes.S] == 1.0 else after * following[codes.S])
        if times is not None:
            times[b].fill_(following[codes.TIMESTEP])

    if o.x.device.type != "cpu":
        for tensor, values in zip(written, host, strict=True):
            tensor.copy_(torch.from_numpy(values))


def _samples(tensor: Tensor | None, size: int, batch: int) -> Sequence[Any]:
    """[size] views of samples that are dense in memory, in memory order; None for each where there is no tensor."""
    if tensor is None:
        return [None] * batch
    return _flat(tensor, size).unbind()


def _flat(tensor: Tensor, size: int) -> Tensor:
    return tensor.as_strided((tensor.shape[0], size), (tensor.stride(0), 1))


def _sum(products: Tensor) -> float:
    """In an order that depends on the number of elements alone."""
    if len(products) > PART:
        products = torch.nn.functional.pad(products, (0, -len(products) % PART)).view(-1, PART).sum(1)
    return products.sum().item()


def _weighted(*terms: tuple[float, Any]) -> Tensor:
    """The sum of weight * tensor in float32, in this order. Under a weight of 0 nothing is read: it may hold NaN, and 0 + -0 would lose the sign."""
    products = [tensor.float() * weight for weight, tensor in terms if weight != 0.0]
    if not products:
        return torch.full_like(terms[0][1], -0.0, dtype=torch.float32)
    total = products[0]
    for product in products[1:]:
        total += product
    return total


def _where(condition: bool, yes: Any, no: Any) -> Any:
    return yes if condition else no
