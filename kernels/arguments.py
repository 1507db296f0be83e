"""What `guided_step` works on, and the copies of what lies in memory otherwise than its kernels read it."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .layout import HISTORY, Row, Rule, State

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Operands(NamedTuple):
    """The tensors of one step, in the order of the custom op's schema.

    uncond, cond   denoiser outputs u and c, [B, C, *S], float16 | bfloat16 | float32, any batch stride. cond = None: only one
                   branch ran, it is passed as `uncond`, then e = u and trace[k, b] = NaN
    x              latents, float32 [B, C, *S], contiguous or channels_last
    history        float32 [L, B, C, *S], L = 0 to 3 slots, each in x's memory format (`history_for`)
    model_input    next denoiser input, [B or 2B, C, *S] in x's memory format, any of the three dtypes; None: not written
    trace          float32 [>= steps, B], d of every step
    state, rows, rules   float64 [B, len(State)], [R, len(Row)], [B, len(Rule)]
    guidance       float32 [B, >= steps, 2], g before the transition and after it
    combined       the caller's own guided output, [B, C, *S] of any of the three dtypes: e of the samples that are not before their
                   transition and whose rule has COMBINED = 1, whatever formula made it. With Q = B = 1 and all else 0 x' keeps its bits
    noise          [B, C, *S] of any of the three dtypes, read where N != 0
    timestep_out   [B or 2B], any number dtype, the next row's timestep
    anchor         float32 [2, B, C, *S] in x's memory format: m and mu of `anchor.push`, written at an anchored sample's first row with
                   both branches; None: no sample is anchored (Rule.ANCHORED is not looked at then)
    shares         float32, as trace: share p of an anchored sample at every row, NaN of all others
    scratch        workspace from `scratch_for(x)`, reused between calls; None: allocated by this call
    """

    uncond: Tensor
    cond: Tensor | None
    x: Tensor
    history: Tensor
    model_input: Tensor | None
    trace: Tensor
    state: Tensor
    rows: Tensor
    rules: Tensor
    guidance: Tensor
    combined: Tensor | None = None
    noise: Tensor | None = None
    timestep_out: Tensor | None = None
    anchor: Tensor | None = None
    shares: Tensor | None = None
    scratch: Tensor | None = None


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """tensor itself if its samples lie in memory as x's do, else a copy that does (a model that answers in another format)."""
    if _strides(tensor) == _strides(x):
        return tensor
    return torch.empty_strided(x.shape, x.stride(), dtype=tensor.dtype, device=x.device).copy_(tensor)


def _strides(tensor: Tensor) -> list[int]:
    """Within a sample, of the dimensions that have any."""
    return [stride for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1]


def dense_like(tensor: Tensor, x: Tensor) -> bool:
    """Whether the samples lie in memory as x's do, one behind the other."""
    return _strides(tensor) == _strides(x) and (len(tensor) == 1 or tensor.stride(0) == x.numel() // len(x))


def memory_format(latents: Tensor) -> torch.memory_format:
    """The one of the two formats that latents are in, contiguous where they are in neither."""
    last = _LAST.get(latents.dim(), torch.contiguous_format)
    only_last = not latents.is_contiguous() and latents.is_contiguous(memory_format=last)
    return last if only_last else torch.contiguous_format


def check(o: Operands) -> None:
    """ValueError for what `guided_step` does not take."""
    x, sizes, batch = o.x, list(o.x.shape), o.x.shape[0]
    if x.dtype != torch.float32 or not x.numel() or not x.is_contiguous(memory_format=memory_format(x)):
        _refuse("x", x, "float32 [B, C, *S], not empty, contiguous or channels_last")
    for name in ("uncond", "cond", "combined", "noise"):
        tensor = getattr(o, name)
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype not in _FLOATS):
            _refuse(name, tensor, f"float16, bfloat16 or float32 {sizes} as x")
    if o.cond is not None and o.cond.dtype != o.uncond.dtype:
        _refuse("cond", o.cond, f"uncond's dtype {o.uncond.dtype}")
    for name, slots, least, most in (("history", o.history, 0, HISTORY), ("anchor", o.anchor, 2, 2)):
        if slots is None:
            continue
        fits = slots.dtype == torch.float32 and slots.shape[1:] == x.shape and least <= len(slots) <= most
        if not fits or (slots.stride()[1:] != x.stride() and len(slots) and not dense_like(slots[0], x)):
            _refuse(name, slots, f"float32 [{least} to {most}, *{sizes}] in x's memory format, see history_for")
    y, time, halves = o.model_input, o.timestep_out, (batch, 2 * batch)
    if y is not None and (
        len(y) not in halves or y.shape[1:] != x.shape[1:] or y.dtype not in _FLOATS or not dense_like(y, x)
    ):
        _refuse("model_input", y, f"float16, bfloat16 or float32 [B or 2B, *{sizes[1:]}] in x's memory format")
    if time is not None and (time.dim() != 1 or len(time) not in halves or not time.is_contiguous()):
        _refuse("timestep_out", time, f"contiguous [{batch}] or [{2 * batch}]")
    tables: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
        "trace": (torch.float32, ("steps", batch)),
        "state": (torch.float64, (batch, len(State))),
        "rows": (torch.float64, ("rows", len(Row))),
        "rules": (torch.float64, (batch, len(Rule))),
        "guidance": (torch.float32, (batch, "steps", 2)),
        "shares": (torch.float32, tuple(o.trace.shape)),
    }
    for name, (dtype, wanted) in tables.items():  # a size that is a word may be any
        table = getattr(o, name)
        if table is None:
            continue
        fits = len(table.shape) == len(wanted) and all(
            isinstance(size, str) or size == found for found, size in zip(table.shape, wanted, strict=True)
        )
        if table.dtype != dtype or not fits or not table.is_contiguous():
            _refuse(name, table, f"contiguous {str(dtype).removeprefix('torch.')} [{', '.join(map(str, wanted))}]")
    if (o.anchor is None) != (o.shares is None):
        raise ValueError("anchor and shares: both or none")


def _refuse(name: str, tensor: Tensor, allowed: str) -> NoReturn:
    raise ValueError(
        f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}; allowed: {allowed}"
    )
