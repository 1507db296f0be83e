"""fastguard: a memorization guard and accelerator for Hugging Face diffusers.

Four concepts, four places: `policies` (what guidance when), `schedules` (a scheduler as a table of coefficients), `loop` (buffers and
the body of a row, around the fused op `kernels.guided_step`), `pipelines` (attaching all of it to a pipeline: `enable`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastguard.batch.task import generate
    from fastguard.loop.report import ImageReport, Report
    from fastguard.pipelines.guard import Guard, enable
    from fastguard.policies.policy import Policy
    from fastguard.policies.presets import PRESETS, policy
    from fastguard.syncs.find import SyncReport, assert_sync_free, find_syncs

__version__ = "0.2.0"

__all__ = [
    "PRESETS", "Guard", "ImageReport", "Policy", "Report", "SyncReport", "assert_sync_free", "enable", "find_syncs", "generate", "policy",
]  # fmt: skip

# Where each public name lives. Imported when it is asked for: torch and diffusers take seconds, `fastguard --version` needs neither.
_HOMES = {
    **dict.fromkeys(("Guard", "enable"), "pipelines.guard"),
    **dict.fromkeys(("PRESETS", "policy"), "policies.presets"),
    **dict.fromkeys(("ImageReport", "Report"), "loop.report"),
    "Policy": "policies.policy",
    "generate": "batch.task",
    **dict.fromkeys(("SyncReport", "assert_sync_free", "find_syncs"), "syncs.find"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastguard' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastguard.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
