"""Bits: of a sample alone, at another place and in a batch of others, and of the caller's own combination."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard.kernels.guided_step import history_for
from fastguard.kernels.layout import NEVER, Phase, Row, Rule, State

from .cases import Case, clone, make


def alone(case: Case, b: int) -> Case:
    """Sample b of a case as a batch of one."""
    batch = case.uncond.shape[0]
    halves = {name: slice(b, None, batch) for name in ("model_input", "timestep_out")}
    columns = {"trace", "history", "anchor", "shares"}
    taken = {}
    for name, tensor in case.arguments.items():
        if tensor is None or name == "rows":
            taken[name] = tensor
        elif name in columns:
            taken[name] = clone(tensor[:, b : b + 1])
        else:
            taken[name] = tensor[halves.get(name, slice(b, b + 1))].clone()
    for name in ("trace", "shares"):
        taken[name] = None if taken[name] is None else taken[name].contiguous()
    for name in ("history", "anchor"):
        if taken[name] is not None:
            taken[name] = history_for(taken["x"], len(case.arguments[name])).copy_(taken[name])
    cond = None if case.cond is None else case.cond[b : b + 1].clone()
    return Case(case.uncond[b : b + 1].clone(), cond, taken)


def permuted(case: Case, order: list[int]) -> Case:
    """The same samples at other places of the batch."""
    batch = len(order)
    both = order + [batch + b for b in order]
    taken = {}
    for name, tensor in case.arguments.items():
        if tensor is None or name == "rows":
            taken[name] = tensor
        elif name in ("trace", "shares"):
            taken[name] = tensor[:, order].contiguous()
        elif name in ("history", "anchor"):
            taken[name] = history_for(case.arguments["x"], len(tensor)).copy_(tensor[:, order])
        else:
            taken[name] = tensor[both[: len(tensor)]]
    return Case(case.uncond[order], None if case.cond is None else case.cond[order], taken)


def same_bits(got: Tensor, want: Tensor, what: str) -> None:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    assert torch.equal(got.contiguous().view(kind), want.contiguous().view(kind)), what


def check_batch_invariance(shape: tuple[int, ...], *, seed: int = 0, **options: Any) -> None:
    """Every sample of a mixed batch, run alone and at another place, gives the same d, state, x, m and model input, to the bit."""
    backend, every = options.pop("backend"), options.pop("every", 1)
    batch = shape[0]
    case = make(seed, shape, **options)
    whole = case.clone()
    whole.run(backend=backend)
    order = list(np.random.default_rng(seed).permutation(batch))
    moved = permuted(case, order)
    moved.run(backend=backend)
    for name, tensor in permuted(whole, order).arguments.items():
        if tensor is not None:
            same_bits(moved.arguments[name], tensor, f"{name} at another place")
    for b in range(0, batch, every):
        single = alone(case, b)
        single.run(backend=backend)
        for name, tensor in alone(whole, b).arguments.items():
            if tensor is not None:
                same_bits(single.arguments[name], tensor, f"{name} of sample {b} alone")


def check_combined_bits(backend: str, dtype: torch.dtype) -> None:
    """Through a row without an update an unguarded sample's combination comes out as it went in: signs of zero, infinities, all."""
    case = make(0, (4, 4, 3, 5), slots=0, combined=dtype, dtype=dtype, halves=1, uniform=True, timestep=None)
    table = case.arguments
    own = table["combined"] = torch.randn(4, 4, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    own.flatten()[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    table["rows"].zero_()
    table["rows"][:, [Row.Q, Row.B, Row.S, Row.ACTIVE]] = 1
    table["rows"][:, Row.STORE] = -1
    table["rules"][:, [Rule.KIND, Rule.GATE_STEPS]] = 0
    table["rules"][:, Rule.COMBINED], table["rules"][:, Rule.SWITCH_ROW] = torch.tensor([1, 1, 1, 0]), NEVER
    table["state"][:, State.PHASE] = torch.tensor([Phase.PLAIN, Phase.AFTER, Phase.BEFORE, Phase.PLAIN])
    case.run(backend=backend)
    same_bits(table["model_input"][:2], own[:2], "the model input of unguarded samples")
    same_bits(table["x"][:2], own[:2].float(), "x of unguarded samples")
    assert not (table["x"][2:] == own[2:].float()).all(), "guarded samples, and those with a scale of their own"
