"""`guided_step` in plain torch, one sample after the other: the CPU's backend, and what the other is compared with."""

import math
from typing import Any

import torch
from torch import Tensor

from . import layout
from .anchor import restrain
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
    (states, trace, *shares), rows, guidance = host, o.rows.cpu().numpy(), o.guidance.cpu().numpy()
    latents = [_samples(t, size, batch) for t in (o.uncond, o.cond, o.combined, o.x, o.noise)]
    slots = [_samples(slot, size, batch) for slot in o.history]
    anchors = [] if o.anchor is None or o.cond is None else [_samples(half, size, batch) for half in o.anchor]
    y = o.model_input
    inputs = None if y is None else y.as_strided((len(y) // batch, batch, size), (batch * size, size, 1)).unbind(1)
    times = None if o.timestep_out is None else o.timestep_out.view(-1, batch).unbind(1)

    for b, (rule, u, c, combined, x, noise) in enumerate(zip(o.rules.tolist(), *latents, strict=True)):
        old = tuple(states[b].tolist())
        k = int(old[layout.STEP])
        at = k + int(old[layout.BASE])
        if not rows[at, layout.ACTIVE]:
            continue
        row, following = rows[at : at + 2].tolist()
        delta: Any = None if c is None else c.float() - u
        d = math.nan if c is None else _sum(delta * delta)
        state, before, own_weight = decide(_where, old, rule, row, d, c is not None)
        own_weight = 0.0 if combined is None else own_weight
        g, f, share = float(guidance[b, k, 0 if before else 1]), 0.0, math.nan
        if anchors and rule[layout.ANCHORED]:
            to_x, to_e = row[layout.X], row[layout.E]
            x0_u, x0_c = x * to_x + u.float() * to_e, x * to_x + c.float() * to_e
            first_c, first_u = anchors[0][b], anchors[1][b]
            first = old[layout.ANCHOR] == layout.UNWRITTEN
            a = delta * to_e if first else first_c - x0_u
            spread = 0.0 if first else _sum((x0_u - first_u).square() + (first_c - first_u).square())
            w = None if combined is None else combined.float() - u
            wa, ww = (0.0, 0.0) if w is None else (_sum(w * a), _sum(w.square()))
            sums = (d, _sum(a.square()), _sum(delta * a), spread, wa, ww)
            state, share, f, g, own_weight = restrain(_where, math.sqrt, state, rule, row, sums, g, own_weight)
            if first and old[layout.PHASE] != layout.PLAIN:
                first_c.copy_(x0_c)
                first_u.copy_(x0_u)
        states[b], trace[k, b] = state, d
        for table in shares:
            table[k, b] = share

        e = u.float() if c is None else delta * g + u
        if own_weight:
            e = combined.float() if own_weight == 1 else (combined.float() - u) * own_weight + u
        e = e - a * f if f else e  # only an anchored sample has an f
        m = e if (row[layout.Q], row[layout.P]) == (1.0, 0.0) else _weighted((row[layout.Q], e), (row[layout.P], x))
        past = [(row[layout.H0 + j], slot[b]) for j, slot in enumerate(slots)]
        drawn = [] if noise is None else [(row[layout.N], noise)]
        after = _weighted((row[layout.A], x), (row[layout.B], m), *past, *drawn)
        if row[layout.STORE] >= 0:
            slots[int(row[layout.STORE])][b].copy_(m)
        x.copy_(after)
        if inputs is not None:  # one or both halves
            inputs[b].copy_(after if following[layout.S] == 1.0 else after * following[layout.S])
        if times is not None:
            times[b].fill_(following[layout.TIMESTEP])

    if o.x.device.type != "cpu":
        for tensor, values in zip(written, host, strict=True):
            tensor.copy_(torch.from_numpy(values))


def _samples(tensor: Tensor | None, size: int, batch: int) -> Any:
    """[size] views of the samples, which are dense, in memory order; None for each where there is no tensor."""
    return [None] * batch if tensor is None else tensor.as_strided((batch, size), (tensor.stride(0), 1)).unbind()


def _sum(products: Tensor) -> float:
    """In an order that depends on the number of elements alone."""
    if len(products) > PART:
        products = torch.nn.functional.pad(products, (0, -len(products) % PART)).view(-1, PART).sum(1)
    return products.sum().item()


def _weighted(*terms: tuple[float, Any]) -> Tensor:
    """The sum of weight * tensor in float32, in this order. Under a weight of 0 nothing is read: it may hold NaN, and 0 + -0 would lose the sign."""
    products = [tensor.float() * weight for weight, tensor in terms if weight != 0.0]
    total = products[0] if products else torch.full_like(terms[0][1], -0.0, dtype=torch.float32)
    for product in products[1:]:
        total += product
    return total


def _where(condition: bool, yes: Any, no: Any) -> Any:
    return yes if condition else no
