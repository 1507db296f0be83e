"""Where the host waits: the tool behind `fastguard.find_syncs`, `fastguard.assert_sync_free` and `fastguard doctor`.

`find` is the front, `probe` runs a pipeline's own call, `pretend` is the device that is not there, `stream` collects what the loop
does on it, `doctor` is the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastguard.syncs.find import SyncReport, assert_sync_free, find_syncs

__all__ = ["SyncReport", "assert_sync_free", "find_syncs"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastguard.syncs' has no attribute {name!r}")
    from fastguard.syncs import find  # imports diffusers, which takes seconds

    return getattr(find, name)
