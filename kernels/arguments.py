"""What `guided_step` works on, and the copies of what lies in memory otherwise than its kernels read it."""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import layout

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Operands(NamedTuple):
    """The tensors of one step, in the order of the custom op's schema. "floats": float16, bfloat16 or float32."""

    uncond: Tensor  # u, floats [B, C, *S], any batch stride; where only one branch ran that one: then e = u, trace[k, b] = NaN
    cond: Tensor | None  # c, as uncond; None: only one branch ran
    x: Tensor  # latents, float32 [B, C, *S], contiguous or channels_last
    history: Tensor  # float32 [L, B, C, *S], L = 0 to 3 slots, each in x's memory format (`history_for`)
    model_input: Tensor | None  # next denoiser input, floats [B or 2B, C, *S] in x's memory format; None: not written
    trace: Tensor  # float32 [>= steps, B], d of every step
    state: Tensor  # float64 [B, len(State)]
    rows: Tensor  # float64 [R, len(Row)]
    rules: Tensor  # float64 [B, len(Rule)]
    guidance: Tensor  # float32 [B, >= steps, 2], g before the transition and after it
    # The caller's own combination, floats [B, C, *S]: e of the samples that are not before their transition and whose rule has
    # COMBINED = 1, whatever formula made it. With Q = B = 1 and all else 0 x' keeps its bits.
    combined: Tensor | None = None
    noise: Tensor | None = None  # floats [B, C, *S], read where N != 0
    timestep_out: Tensor | None = None  # [B or 2B], any number dtype, the next row's timestep
    # float32 [2, B, C, *S] in x's memory format: m and mu of `anchor.restrain`, written at an anchored sample's first row with both
    # branches; None: no sample is anchored (Rule.ANCHORED is not looked at then).
    anchor: Tensor | None = None
    shares: Tensor | None = None  # as trace: share p of an anchored sample at every row, NaN of all others
    scratch: Tensor | None = None  # workspace from `scratch_for(x)`, reused between calls; None: allocated by this call


def like(tensor: Tensor, x: Tensor, *, dense: bool = False) -> Tensor:
    """tensor itself if its samples lie in memory as x's do (dense: and one behind the other), else a copy, as of a model that answers in another format."""
    if tensor.stride() == x.stride() or (tensor if dense else tensor[:1]).is_contiguous(memory_format=memory_format(x)):
        return tensor
    return torch.empty_strided(x.shape, x.stride(), dtype=tensor.dtype, device=x.device).copy_(tensor)


def memory_format(latents: Tensor) -> torch.memory_format:
    """The one of the two formats that latents are in, contiguous where they are in neither."""
    last = _LAST.get(latents.dim(), torch.contiguous_format)
    return torch.contiguous_format if latents.is_contiguous() or not latents.is_contiguous(memory_format=last) else last


def check(o: Operands) -> None:
    """ValueError for what `guided_step` does not take."""
    x, batch, halves, as_x = o.x, len(o.x), (len(o.x), 2 * len(o.x)), memory_format(o.x)
    if x.dtype != torch.float32 or not x.numel() or not x.is_contiguous(memory_format=as_x):
        _refuse("x", x, "float32 [B, C, *S], not empty, contiguous or channels_last")
    for name, tensor in (("uncond", o.uncond), ("cond", o.cond), ("combined", o.combined), ("noise", o.noise)):
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype not in _FLOATS):
            _refuse(name, tensor, f"float16, bfloat16 or float32 {list(x.shape)} as x")
    if o.cond is not None and o.cond.dtype != o.uncond.dtype:
        _refuse("cond", o.cond, f"uncond's dtype {o.uncond.dtype}")
    for name, slots, least, most in (("history", o.history, 0, layout.HISTORY), ("anchor", o.anchor, 2, 2)):
        if slots is not None and not (
            slots.dtype == torch.float32 and slots.shape[1:] == x.shape and least <= len(slots) <= most
            and (slots.stride()[1:] == x.stride() or not len(slots) or slots[0].is_contiguous(memory_format=as_x))
        ):  # fmt: skip
            _refuse(name, slots, f"float32 [{least} to {most}, *{list(x.shape)}] in x's memory format, see history_for")
    tables = (  # with the sizes that may be any taken from the table itself
        ("trace", o.trace, torch.float32, (*o.trace.shape[:1], batch), "[steps, B]"),
        ("state", o.state, torch.float64, (batch, layout.STATE_WIDTH), "[B, len(State)]"),
        ("rows", o.rows, torch.float64, (*o.rows.shape[:1], layout.ROW_WIDTH), "[rows, len(Row)]"),
        ("rules", o.rules, torch.float64, (batch, layout.RULE_WIDTH), "[B, len(Rule)]"),
        ("guidance", o.guidance, torch.float32, (batch, *o.guidance.shape[1:2], 2), "[B, steps, 2]"),
        ("shares", o.shares, torch.float32, o.trace.shape, "[steps, B] as trace"),
    )
    for name, table, dtype, shape, sizes in tables:
        if table is not None and (table.dtype != dtype or table.shape != shape or not table.is_contiguous()):
            _refuse(name, table, f"contiguous {str(dtype).removeprefix('torch.')} {sizes}, B = {batch}")
    y, times = o.model_input, o.timestep_out
    fits = y is None or (len(y) in halves and y.shape[1:] == x.shape[1:] and y.dtype in _FLOATS)
    if y is not None and not (fits and y.is_contiguous(memory_format=as_x)):
        _refuse("model_input", y, f"float16, bfloat16 or float32 [B or 2B, *{list(x.shape[1:])}] in x's memory format")
    if times is not None and not (times.dim() == 1 and len(times) in halves and times.is_contiguous()):
        _refuse("timestep_out", times, f"contiguous [{batch}] or [{2 * batch}]")
    if (o.anchor is None) != (o.shares is None):
        raise ValueError("anchor and shares: both or none")


def _refuse(name: str, tensor: Tensor, allowed: str) -> NoReturn:
    found = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
    raise ValueError(f"{name} is {found}; allowed: {allowed}")
