"""What `guided_step` accepts, and the copies of what lies in memory otherwise than its kernels read it."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import layout
from .layout import Row, Rule, State

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Operands(NamedTuple):
    """The tensors of one step, in the order of the custom op's schema; `guided_step` says what each is."""

    uncond: Tensor
    cond: Tensor | None
    combined: Tensor | None
    x: Tensor
    history: Tensor
    model_input: Tensor | None
    trace: Tensor
    state: Tensor
    rows: Tensor
    rules: Tensor
    guidance: Tensor
    noise: Tensor | None
    timestep_out: Tensor | None
    anchor: Tensor | None
    shares: Tensor | None
    scratch: Tensor | None


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """tensor itself if its samples lie in memory as x's do, else a copy that does (a model that answers in another format)."""
    if tensor.stride()[1:] == x.stride()[1:] or _strides(tensor) == _strides(x):
        return tensor
    return torch.empty_strided(x.shape, x.stride(), dtype=tensor.dtype, device=x.device).copy_(tensor)


def _strides(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1]


def dense_like(tensor: Tensor, x: Tensor) -> bool:
    if tensor.stride() == x.stride():
        return True
    return _strides(tensor) == _strides(x) and (tensor.shape[0] == 1 or tensor.stride(0) == x.numel() // x.shape[0])


def memory_format(latents: Tensor) -> torch.memory_format:
    """The one of the two formats that latents are in, contiguous where they are in neither."""
    last = _LAST.get(latents.dim(), torch.contiguous_format)
    only_last = not latents.is_contiguous() and latents.is_contiguous(memory_format=last)
    return last if only_last else torch.contiguous_format


def check(operands: Operands) -> None:
    """ValueError for what `guided_step` does not take."""
    uncond, cond, combined, x, history, model_input, trace, state, rows, rules, guidance, noise = operands[:12]
    timestep_out, anchor, shares, _ = operands[12:]
    shape, batch = x.shape, x.shape[0]
    batches = (batch, 2 * batch)
    if x.dtype != torch.float32 or not x.numel() or not x.is_contiguous(memory_format=memory_format(x)):
        _refuse("x", x, "float32 [B, C, *S], not empty, contiguous or channels_last")
    for name, tensor in (("uncond", uncond), ("cond", cond), ("combined", combined), ("noise", noise)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in _FLOATS):
            _refuse(name, tensor, f"float16, bfloat16 or float32 {list(shape)} as x")
    if cond is not None and cond.dtype != uncond.dtype:
        _refuse("cond", cond, f"uncond's dtype {uncond.dtype}")
    slots = history.shape[0]
    if (
        history.dtype != torch.float32
        or history.shape[1:] != shape
        or slots > layout.HISTORY
        or (slots and history.stride()[1:] != x.stride() and not dense_like(history[0], x))
    ):
        _refuse(
            "history", history, f"float32 [0 to {layout.HISTORY}, *{list(shape)}] in x's memory format, see history_for"
        )
    if model_input is not None and (
        model_input.shape[0] not in batches
        or model_input.shape[1:] != shape[1:]
        or model_input.dtype not in _FLOATS
        or not dense_like(model_input, x)
    ):
        _refuse(
            "model_input",
            model_input,
            f"float16, bfloat16 or float32 [B or 2B, *{list(shape[1:])}] in x's memory format",
        )
    if anchor is not None and (
        anchor.dtype != torch.float32 or anchor.shape != (2, *shape) or not dense_like(anchor[0], x)
    ):
        _refuse("anchor", anchor, f"float32 {[2, *shape]} in x's memory format, see history_for")
    if shares is not None and (
        shares.dtype != torch.float32 or shares.shape != trace.shape or not shares.is_contiguous()
    ):
        _refuse("shares", shares, f"contiguous float32 {list(trace.shape)} as trace")
    if (anchor is None) != (shares is None):
        raise ValueError("anchor and shares: both or none")
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
