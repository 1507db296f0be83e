"""fastguard: a memorization guard and accelerator for Hugging Face diffusers.

Five concepts, five places: `policy` (what guidance when), `schedule` (a scheduler as a table of coefficients), `denoiser` (one
batched call for both branches), `loop` (buffers and the body of a step, around the fused op `kernels.guided_step`), `enable`
(attaching all of it to a pipeline).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastguard.enable import Guard, enable
from fastguard.policy import PRESETS, Policy, policy
from fastguard.report import ImageReport, Report

if TYPE_CHECKING:
    from fastguard.syncs import SyncReport, assert_sync_free, find_syncs

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Guard",
    "ImageReport",
    "Policy",
    "Report",
    "SyncReport",
    "assert_sync_free",
    "enable",
    "find_syncs",
    "policy",
]


def __getattr__(name: str) -> Any:
    if name not in ("SyncReport", "assert_sync_free", "find_syncs"):
        raise AttributeError(f"module 'fastguard' has no attribute {name!r}")
    from fastguard import syncs  # imports diffusers, which takes seconds

    return getattr(syncs, name)
