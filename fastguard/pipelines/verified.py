"""Families held against a probe of the user's own call, or made of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastguard.pipelines.families import Family, OwnFamily
from fastguard.pipelines.probe import LINEAR_NARROW, Probe, probe

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
UNKNOWN = OwnFamily(name="unknown", pipelines=())  # until its first call is probed


def checked(pipe: Any, family: Family | OwnFamily, values: Mapping[str, Any], stock_call: Callable[..., Any]) -> Any:
    """The family with which this call can be guarded: itself, if the probe of the call agrees, or the inferred one if it is UNKNOWN.

    RuntimeError with what the probe found, where it contradicts; TypeError where nothing can be inferred.
    """
    if family.name == UNKNOWN.name:
        return infer(pipe, values, stock_call)
    found = examined(pipe, family, values, stock_call).contradictions()
    if found:
        raise RuntimeError(f"{type(pipe).__name__}: the guard does not know this loop: {found[0]}")
    return family


def examined(pipe: Any, family: Family | OwnFamily, values: Mapping[str, Any], stock_call: Callable[..., Any]) -> Probe:
    """A probe of the call, held against the family (UNKNOWN: against the inferred one)."""
    if family.name == UNKNOWN.name:
        family = infer(pipe, values, stock_call)
    return probe(pipe, values, in_own_terms(family), stock_call)


def in_own_terms(family: Family | OwnFamily) -> OwnFamily:
    """What the fused kind takes for granted, as a declaration."""
    if isinstance(family, OwnFamily):
        return family
    return OwnFamily(
        name=family.name, pipelines=family.pipelines, denoisers=(family.denoiser,), nonlinear="guidance_rescale"
    )


def likely_denoisers(pipe: Any) -> tuple[str, ...]:
    """The names under which the pipeline may have denoisers. TypeError if there is none."""
    names = tuple(one for one in DENOISERS if getattr(pipe, one, None) is not None)
    if not names:
        raise TypeError(
            f"pipe: {type(pipe).__name__} has no denoiser under a name that is known: {', '.join(DENOISERS)}"
        )
    return names


def infer(pipe: Any, arguments: Mapping[str, Any], stock_call: Callable[..., Any] | None = None) -> OwnFamily:
    """The family of a pipeline that nobody declared, from its probe. TypeError if its combination is not linear in two branches."""
    name = type(pipe).__name__
    denoisers = likely_denoisers(pipe)
    known = {*inspect.signature(stock_call or type(pipe).__call__).parameters, *arguments}
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    problem = f"its call has no {scale}"
    for calls in (1, 2) if scale in known else ():
        guess = OwnFamily(name="probe", pipelines=(name,), denoisers=denoisers, calls=calls, scale=scale)
        found = probe(pipe, arguments, guess, stock_call)
        problem = found.problem or "no row ran a second branch"
        row = next((row for row in found.rows if row.cond is not None), None)
        if found.problem or row is None or row.cond is None or row.uncond is None:
            continue
        total = row.cond + row.uncond
        problem = f"the probe found e = {row.cond:.4g} p + {row.uncond:.4g} q, residual {row.residual:.1g}"
        if not all(row.linear for row in found.rows) or abs(abs(total) - 1) > (LINEAR_NARROW if row.narrow else 1e-4):
            continue
        sign = 1 if total > 0 else -1
        second = row.cond * sign > row.uncond * sign  # the branch called "cond" in the guess has the larger weight
        effective = max(row.cond * sign, row.uncond * sign)
        return OwnFamily(
            name="probe",
            pipelines=(name,),
            denoisers=denoisers,
            calls=calls,
            order=guess.order if second else guess.order[::-1],
            sign=sign,
            scale=scale,
            offset=round(effective - row.scale, 3),
            skippable=False,
        )
    raise TypeError(f"pipe: {name} cannot be guarded: {problem}, which is not u + g (c - u) of two branches")
