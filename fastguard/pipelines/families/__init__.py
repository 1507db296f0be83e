"""The allow-list: the only code that knows a pipeline class.

Two kinds. `Family`: the guard takes the combination into its own op, so it may only run where that is known to be u + s (c - u) on a
batch ordered [unconditional, conditional]. `OwnFamily`: the pipeline combines, and the guard replaces the result for guarded images.
A pipeline qualifies by its `__call__`: a subclass that overrides `__call__` does not inherit its parent's place.
"""

from __future__ import annotations

from typing import Any

import diffusers

from fastguard.pipelines.families.base import Family
from fastguard.pipelines.families.guiders import GUIDERS
from fastguard.pipelines.families.one_batch import ONE_BATCH
from fastguard.pipelines.families.own import OwnFamily
from fastguard.pipelines.families.pixart import PIXART
from fastguard.pipelines.families.refused import reason_against
from fastguard.pipelines.families.stable_diffusion import (
    CONTROLNET,
    CONTROLNET_FIXED,
    CONTROLNET_INPAINT,
    IMAGE_TO_IMAGE,
    INPAINT,
    TEXT_TO_IMAGE,
)
from fastguard.pipelines.families.stable_diffusion_3 import SD3, SD3_INPAINT
from fastguard.pipelines.families.two_calls import TWO_CALLS

FAMILIES: tuple[Family, ...] = (
    TEXT_TO_IMAGE,
    IMAGE_TO_IMAGE,
    INPAINT,
    CONTROLNET,
    CONTROLNET_FIXED,
    CONTROLNET_INPAINT,
    SD3,
    SD3_INPAINT,
    PIXART,
)
OWN_FAMILIES: tuple[OwnFamily, ...] = (*TWO_CALLS, *ONE_BATCH, *GUIDERS)


def find(pipeline_class: type) -> Any:
    """The Family or OwnFamily of a pipeline class, or TypeError with why it is not supported."""
    families: tuple[Family | OwnFamily, ...] = (*FAMILIES, *OWN_FAMILIES)
    for family in families:
        for name in family.pipelines:
            known: Any = getattr(diffusers, name, None)
            if known is not None and pipeline_class.__call__ is known.__call__:
                return family
    raise TypeError(f"pipe: {pipeline_class.__name__} is not supported: {reason_against(pipeline_class.__name__)}")


__all__ = ["FAMILIES", "OWN_FAMILIES", "Family", "OwnFamily", "find"]
