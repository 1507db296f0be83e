"""Everything between two denoiser calls as one operation: norm of the guidance, decision, guided output, scheduler step.

For every sample b of the batch, with k = state[b, STEP], row r = rows[state[b, BASE] + k] and delta = c - u:

    d = ||delta||^2                                            trace[k, b] = d
    g = guidance[b, k, 0 before the transition | 1 otherwise]  (`decide`: the transition of Jain et al., CVPR 2025, arXiv 2411.16738)
    e = u + g delta - f a                                      f = 0 but for anchored samples (`anchor.restrain`);
                                                               or `combined`, same bits, where that is given and the sample unguarded
    m = P x + Q e
    x = A x + B m + sum_j H_j history[j] + N noise             history[STORE] = m
    model_input = S_next x                                     timestep_out = TIMESTEP_next,  state[b, STEP] = k + 1

Rows are filled by `fastguard.schedules.compiler`, rules, guidance and the first state by `fastguard.policies.plan`; `layout` names the columns.

Numbers: d, e, m and x are float32 whatever the model's dtype; decisions are float64 scalars of the float32 d. d is summed in an
order that depends on the latent's size (and memory format) alone, and every elementwise result is rounded the same way wherever
the sample lies, so a sample's bits do not depend on its batch. A sample whose row has ACTIVE = 0 is not touched at all.
"""

import os

import torch
from torch import Tensor

from . import torch_step, triton_step
from .arguments import Operands, check, like
from .layout import State


def guided_step(operands: Operands, backend: str | None = None) -> None:
    """Run one step of the module's formula in place: changes x, history, model_input, trace, state, timestep_out, anchor, shares, scratch.

    backend: "triton" or "torch"; None: triton on CUDA and ROCm, torch elsewhere, unless the environment variable FASTGUARD_BACKEND
    names one. ValueError for a shape, dtype or memory format other than `Operands` says.
    """
    check(operands)
    chosen = choose_backend(operands.x, backend)
    # The dispatcher costs this many arguments 45 us a call (stock's whole step on 8 small latents: 280 us), so it is only used where
    # somebody is watching: a compiler, FakeTensor, any other mode or subclass.
    if torch.compiler.is_compiling() or type(operands.x) is not Tensor or torch._C._len_torch_dispatch_stack():
        torch.ops.fastguard.guided_step.default(*operands, chosen)
    else:
        _run(operands, chosen)


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """The one place that chooses: the argument, else FASTGUARD_BACKEND, else the device."""
    backend = backend or os.environ.get("FASTGUARD_BACKEND") or ("triton" if x.device.type == "cuda" else "torch")
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: torch, triton")
    return backend


def scratch_for(x: Tensor) -> Tensor:
    """Workspace that `guided_step` can reuse for every step on latents like x: float32, one dimension, contents irrelevant."""
    blocks = -(-2 * x[0].numel() // triton_step.BLOCK)
    return x.new_empty(len(x) * (2 * len(State) + 6 * blocks))


def history_for(x: Tensor, slots: int) -> Tensor:
    """[slots, *x.shape] zeros, every slot in x's memory format."""
    strides = (x.numel(), *x.stride())
    return torch.empty_strided((slots, *x.shape), strides, dtype=torch.float32, device=x.device).zero_()


def _run(o: Operands, backend: str) -> None:
    x, c, combined, noise = o.x, o.cond, o.combined, o.noise
    o = o._replace(
        uncond=like(o.uncond.detach(), x),
        cond=None if c is None else like(c.detach(), x),
        combined=None if combined is None else like(combined.detach(), x),
        noise=None if noise is None else like(noise, x, dense=True),
        scratch=scratch_for(x) if o.scratch is None and backend == "triton" else o.scratch,
    )
    (triton_step.guided_step_triton if backend == "triton" else torch_step.guided_step_torch)(o)


_library = torch.library.Library("fastguard", "FRAGMENT")
_library.define(
    "guided_step(Tensor uncond, Tensor? cond, Tensor(a!) x, Tensor(b!) history, Tensor(c!)? model_input, Tensor(d!) trace, "
    "Tensor(e!) state, Tensor rows, Tensor rules, Tensor guidance, Tensor? combined, Tensor? noise, Tensor(f!)? timestep_out, "
    "Tensor(g!)? anchor, Tensor(h!)? shares, Tensor(i!)? scratch, str backend) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("guided_step", lambda *given: _run(Operands(*given[:-1]), given[-1]), "CompositeExplicitAutograd")
# Nothing is returned and no shape depends on data, so FakeTensor, torch.compile and export see one node.
torch.library.register_fake("fastguard::guided_step", lambda *_: None, lib=_library)
