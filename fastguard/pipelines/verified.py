"""Families held against a probe of the user's own call, or made of one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastguard.pipelines.families import Family, OwnFamily
from fastguard.pipelines.probe import Probe, probe

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
    """The family of a pipeline that nobody declared: read off its first guided row, and probed as a declared one is.

    TypeError unless it combines u + g (c - u) with g = s + offset above 1 in every row, for every image.
    """
    name = type(pipe).__name__
    denoisers = likely_denoisers(pipe)
    known = {*inspect.signature(stock_call or type(pipe).__call__).parameters, *arguments}
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    problem = f"its call has no {scale}"
    for calls in (1, 2) if scale in known else ():
        guess = OwnFamily(
            name="probe", pipelines=(name,), denoisers=denoisers, calls=calls, scale=scale, skippable=False
        )
        found = probe(pipe, arguments, guess, stock_call)
        row = next((row for row in found.rows if row.cond is not None), None)
        if found.problem or row is None or row.cond is None or row.uncond is None:
            problem = found.problem or "no row ran a second branch"
            continue
        sign = 1 if row.cond + row.uncond > 0 else -1
        p, q = sign * row.cond, sign * row.uncond
        offset = round(max(p, q) - row.scale, 4)
        order = guess.order if p > q else guess.order[::-1]  # c is the branch that weighs more
        family = dataclasses.replace(guess, order=order, sign=sign, offset=offset)
        contradictions = probe(pipe, arguments, family, stock_call).contradictions()
        if not contradictions and row.scale + offset > 1:
            return family
        found_there = f"row {found.rows.index(row)}: e = {row.cond:.4g} p + {row.uncond:.4g} q"
        problem = contradictions[0] if contradictions else f"{found_there}: g is at most 1, where either may be c"
        break
    raise TypeError(
        f"pipe: {name} cannot be guarded: {problem}, which is not u + g (c - u) of two branches with one g above 1"
    )
