"""fastguard: a memorization guard and accelerator for Hugging Face diffusers.

Five concepts, five places: `policy` (what guidance when), `schedule` (a scheduler as a table of coefficients), `denoiser` (one
batched call for both branches), `loop` (buffers and the body of a step, around the fused op `kernels.guided_step`), `enable`
(attaching all of it to a pipeline).
"""

from fastguard.enable import Guard, enable
from fastguard.policy import PRESETS, Policy, policy
from fastguard.report import ImageReport, Report
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
