"""The allow-list: the only code that knows a pipeline class.

Two kinds. `Family`: the guard takes the combination into its own op, so it may only run where that is known to be u + s (c - u) on a
batch ordered [unconditional, conditional]. `OwnFamily`: the pipeline combines, and the guard replaces the result for guarded images.
A pipeline qualifies by its `__call__`: a subclass that overrides `__call__` does not inherit its parent's place.
"""

from __future__ import annotations

import functools
from typing import Any

from fastguard.pipelines.families.base import Family
from fastguard.pipelines.families.fused import FUSED
from fastguard.pipelines.families.guiders import GUIDERS
from fastguard.pipelines.families.own import OwnFamily
from fastguard.pipelines.families.refused import reason_against
from fastguard.pipelines.families.table import TABLE

FAMILIES: tuple[Family, ...] = FUSED
OWN_FAMILIES: tuple[OwnFamily, ...] = (*TABLE, *GUIDERS)


@functools.cache
def _named() -> dict[str, Family | OwnFamily]:
    families: tuple[Family | OwnFamily, ...] = (*FAMILIES, *OWN_FAMILIES)
    return {name: family for family in families for name in family.pipelines}


def find(pipeline_class: Any) -> Any:
    """The Family or OwnFamily of a pipeline class, or TypeError with why it is not supported."""
    for kind in pipeline_class.__mro__:
        family = _named().get(kind.__name__)
        if family is not None and kind.__module__.startswith("diffusers.") and pipeline_class.__call__ is kind.__call__:
            return family
    raise TypeError(f"pipe: {pipeline_class.__name__} is not supported: {reason_against(pipeline_class.__name__)}")


__all__ = ["FAMILIES", "OWN_FAMILIES", "Family", "OwnFamily", "find"]
