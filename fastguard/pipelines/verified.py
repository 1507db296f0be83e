"""Families held against a probe of the user's own call, or made of one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from fastguard.pipelines.enabled import stock_class
from fastguard.pipelines.families import Family, parts_of
from fastguard.pipelines.probe import Probe, probe

DENOISERS = ("transformer", "transformer_2", "unet", "prior", "decoder")
UNKNOWN = "unknown"  # the name of a family whose first call is to be probed


def unlisted(pipe: Any) -> Family:
    """What is known of a pipeline class that nobody declared: under which names it may have denoisers. TypeError if there is none."""
    name, found = stock_class(type(pipe)).__name__, tuple(parts_of(pipe, DENOISERS))
    if not found:
        raise TypeError(f"pipe: {name} has no denoiser under a name that is known: {', '.join(DENOISERS)}")
    return Family(name=UNKNOWN, pipelines=(name,), denoisers=found, skippable=False)


def examined(pipe: Any, family: Family, values: Mapping[str, Any]) -> Probe:
    """A probe of the call, held against the family, or against the one that is inferred where it is unknown."""
    return infer(pipe, values) if family.name == UNKNOWN else probe(pipe, values, family)


def infer(pipe: Any, arguments: Mapping[str, Any]) -> Probe:
    """The family of a pipeline that nobody declared is read off its first guided row, and probed as a declared one is.

    TypeError unless it combines u + g (c - u) with g = s + offset above 1 in every row, for every image.
    """
    stock: Any = stock_class(type(pipe))
    known = {*inspect.signature(stock.__call__).parameters, *arguments}
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    problem = f"its call has no {scale}"
    for calls in (1, 2) if scale in known else ():
        guess = dataclasses.replace(unlisted(pipe), name="probe", calls=calls, scale=scale)
        found = probe(pipe, arguments, guess)
        row = next((row for row in found.rows if row.cond is not None), None)
        if found.problem or row is None or row.cond is None or row.uncond is None:
            problem = found.problem or "no row ran a second branch"
            continue
        sign = 1 if row.cond + row.uncond > 0 else -1
        p, q = sign * row.cond, sign * row.uncond
        offset = round(max(p, q) - row.scale, 4)
        order = guess.order if p > q else guess.order[::-1]  # c is the branch that weighs more
        held = probe(pipe, arguments, dataclasses.replace(guess, order=order, sign=sign, offset=offset))
        contradictions = held.contradictions()
        if not contradictions and row.scale + offset > 1:
            return held
        found_there = f"row {found.rows.index(row)}: e = {row.cond:.4g} p + {row.uncond:.4g} q"
        problem = contradictions[0] if contradictions else f"{found_there}: g is at most 1, where either may be c"
        break
    raise TypeError(
        f"pipe: {stock.__name__} cannot be guarded: {problem}, which is not u + g (c - u) of two branches with one g above 1"
    )
