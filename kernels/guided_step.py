"""Everything between two denoiser calls as one operation: norm of the guidance, decision, guided output, scheduler step.

For every sample b of the batch, with k = state[b, STEP], row r = rows[state[b, BASE] + k] and delta = c - u:

    d = ||delta||^2                                            trace[k, b] = d
    g = guidance[b, k, 0 before the transition | 1 otherwise]  (`decide`: the transition of Jain et al., CVPR 2025, arXiv 2411.16738)
    e = u + g delta - f a                                      f = 0 but for anchored samples (`anchor.push`);
                                                               or `combined`, same bits, where that is given and the sample unguarded
    m = P x + Q e
    x = A x + B m + sum_j H_j history[j] + N noise             history[STORE] = m
    model_input = S_next x                                     timestep_out = TIMESTEP_next,  state[b, STEP] = k + 1

Rows are filled by `fastguard.schedules.compiler`, rules, guidance and the first state by `fastguard.policies.plan`; `layout` names the columns.

Numbers: d, e, m and x are float32 whatever the model's dtype; decisions are float64 scalars of the float32 d. d is summed in an
order that depends on the latent's size (and memory format) alone, and every elementwise result is rounded the same way wherever
the sample lies, so a sample's bits do not depend on its batch. A sample whose row has ACTIVE = 0 is not touched at all.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from . import torch_step, triton_step
from .arguments import Operands, check, dense_like, like
from .layout import State

BACKENDS = ("torch", "triton")


def guided_step(
    uncond: Tensor,
    cond: Tensor | None,
    *,
    combined: Tensor | None = None,
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
    anchor: Tensor | None = None,
    shares: Tensor | None = None,
    scratch: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Run one step of the module's formula in place; changes x, history, model_input, trace, state, timestep_out and scratch.

    Args:
        uncond, cond: denoiser outputs u and c, [B, C, *S], float16 | bfloat16 | float32, any batch stride. cond = None: only one
            branch ran, it is passed as `uncond`, then e = u and trace[k, b] = NaN.
        combined: the caller's own guided output, [B, C, *S] of any of the three dtypes: e of the samples that are not before their
            transition and whose rule has COMBINED = 1, whatever formula made it. With Q = B = 1 and all else 0 x' keeps its bits.
        x: latents, float32 [B, C, *S], contiguous or channels_last.
        history: float32 [L, B, C, *S], L = 0 to 3 slots, each in x's memory format.
        model_input: next denoiser input, [B or 2B, C, *S] in x's memory format, any of the three dtypes; None: not written.
        trace: float32 [>= steps, B], d of every step.
        state, rows, rules: float64 [B, len(State)], [R, len(Row)], [B, len(Rule)].
        guidance: float32 [B, >= steps, 2], g before the transition and after it.
        noise: [B, C, *S] of any of the three dtypes, read where N != 0.
        timestep_out: [B or 2B], any number dtype, the next row's timestep.
        anchor: float32 [2, B, C, *S] in x's memory format: m and mu of `anchor.push`, written at an anchored sample's first row with both
            branches; None: no sample is anchored (Rule.ANCHORED is not looked at then).
        shares: float32, as trace: share p of an anchored sample at every row, NaN of all others.
        scratch: workspace from `scratch_for(x)`, reused between calls; None: allocated by this call.
        backend: "triton" or "torch"; None: triton on CUDA and ROCm, torch elsewhere, unless the environment variable FASTGUARD_BACKEND
            names one.

    Raises:
        ValueError: a shape, dtype or memory format other than the above.
    """
    operands = Operands(
        uncond,
        cond,
        combined,
        x,
        history,
        model_input,
        trace,
        state,
        rows,
        rules,
        guidance,
        noise,
        timestep_out,
        anchor,
        shares,
        scratch,
    )
    check(operands)
    chosen = choose_backend(x, backend)
    # The dispatcher costs this many arguments 45 us a call (stock's whole step on 8 small latents: 280 us), so it is only used where
    # somebody is watching: a compiler, FakeTensor, any other mode or subclass.
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        torch.ops.fastguard.guided_step.default(*operands, chosen)
    else:
        _run(operands, chosen)


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
    return x.new_empty(
        x.shape[0] * max(2 * torch_step.width(size), 2 * len(State) + 5 * -(-2 * size // triton_step.BLOCK))
    )


def history_for(x: Tensor, slots: int) -> Tensor:
    """[slots, *x.shape] zeros, every slot in x's memory format."""
    return torch.empty_strided(
        (slots, *x.shape), (x.numel(), *x.stride()), dtype=torch.float32, device=x.device
    ).zero_()


def _run(operands: Operands, backend: str) -> None:
    x, noise, scratch = operands.x, operands.noise, operands.scratch
    operands = operands._replace(
        uncond=like(operands.uncond.detach(), x),
        cond=None if operands.cond is None else like(operands.cond.detach(), x),
        combined=None if operands.combined is None else like(operands.combined.detach(), x),
        noise=noise if noise is None or dense_like(noise, x) else like(noise.contiguous(), x),
        scratch=scratch_for(x) if scratch is None else scratch,
    )
    if backend == "triton":
        triton_step.guided_step_triton(operands)
    else:
        torch_step.guided_step_torch(operands)


def _implementation(*arguments: Any) -> None:
    *tensors, backend = arguments
    _run(Operands(*tensors), backend)


def _fake(*_: Any) -> None:
    """Nothing is returned and no shape depends on data, so FakeTensor, torch.compile and export see one node."""


_library = torch.library.Library("fastguard", "FRAGMENT")
_library.define(
    "guided_step(Tensor uncond, Tensor? cond, Tensor? combined, Tensor(a!) x, Tensor(b!) history, Tensor(c!)? model_input, Tensor(d!) trace, "
    "Tensor(e!) state, Tensor rows, Tensor rules, Tensor guidance, Tensor? noise, Tensor(f!)? timestep_out, Tensor(g!)? anchor, Tensor(h!)? shares, "
    "Tensor(i!)? scratch, "
    "str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("guided_step", _implementation, "CompositeExplicitAutograd")
torch.library.register_fake("fastguard::guided_step", _fake, lib=_library)
