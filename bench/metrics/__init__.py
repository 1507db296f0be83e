"""What is measured on images, and by which network: SSCD, CLIP score, FID.

Every measure carries `network`, a line that says which weights made the number; it stands beside the number in every table.
"""

from __future__ import annotations

from bench.metrics.pairings import cosine, own, summary, whole_set
from bench.metrics.scores import ENOUGH, Clip, Fid, note
from bench.metrics.sscd import Sscd, onnx_sscd, torchscript_sscd

__all__ = [
    "ENOUGH",
    "Clip",
    "Fid",
    "Sscd",
    "cosine",
    "note",
    "onnx_sscd",
    "own",
    "summary",
    "torchscript_sscd",
    "whole_set",
]
