"""The guard as two nodes of ComfyUI: docs/comfyui.md. ComfyUI finds the mappings below."""

from .node import GuardReport, MemorizationGuard

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

NODE_CLASS_MAPPINGS = {"FastguardMemorizationGuard": MemorizationGuard, "FastguardReport": GuardReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FastguardMemorizationGuard": "Memorization Guard (fastguard)",
    "FastguardReport": "Memorization Guard Report (fastguard)",
}
