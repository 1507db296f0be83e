"""The allow-list: the only code that knows a pipeline class.

The guard ignores the pipeline's own combination of the two branches, so it may only run where that combination is known to be
u + s (c - u) on a batch ordered [unconditional, conditional]. A pipeline qualifies by its `__call__`: a subclass that overrides
`__call__` does not inherit its parent's place.
"""

from __future__ import annotations

from typing import Any

import diffusers

from fastguard.pipelines.families.base import Family
from fastguard.pipelines.families.pixart import PIXART
from fastguard.pipelines.families.stable_diffusion import (
    CONTROLNET,
    CONTROLNET_FIXED,
    CONTROLNET_INPAINT,
    IMAGE_TO_IMAGE,
    INPAINT,
    TEXT_TO_IMAGE,
)
from fastguard.pipelines.families.stable_diffusion_3 import SD3, SD3_INPAINT

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


def find(pipeline_class: type) -> Family:
    """The family of a pipeline class, or TypeError with what is supported."""
    for family in FAMILIES:
        for name in family.pipelines:
            known: Any = getattr(diffusers, name, None)
            if known is not None and pipeline_class.__call__ is known.__call__:
                return family
    supported = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise TypeError(
        f"pipe: {pipeline_class.__name__} is not supported; its guidance arithmetic is not known to be u + s (c - u) on "
        f"[unconditional, conditional]. Supported: {supported}"
    )


__all__ = ["FAMILIES", "Family", "find"]
