"""The numbers that Jain et al. publish (CVPR 2025, arXiv 2411.16738): theirs, not measured here.

Similarity is the 95th percentile of SSCD, each generation against the whole training set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.paper.tables import Table, number

SETTINGS = {
    "S1": "Stable Diffusion 2.1 fine-tuned on LAION-10k",
    "S2": "Stable Diffusion 2.1 fine-tuned on Imagenette",
    "S3": "Stable Diffusion 1.4 fine-tuned on 200 duplicated pairs",
}
# (setting, method as the paper calls it, our method of that kind or "", similarity, CLIP score, FID)
ROWS: tuple[tuple[str, str, str, float, float | None, float], ...] = (
    ("S1", "none", "none", 0.6504, 0.3027, 16.84),
    ("S1", "random word", "random words", 0.5254, 0.2941, 17.41),
    ("S1", "random number", "random numbers", 0.5416, 0.2993, 17.02),
    ("S1", "Wen", "Wen", 0.3853, 0.2895, 16.72),
    ("S1", "Ren", "Ren", 0.6028, 0.2959, 20.29),
    ("S1", "STP", "stp", 0.2857, 0.2976, 19.85),
    ("S1", "OG+STP", "og+stp", 0.3811, 0.3020, 15.67),
    ("S3", "none", "none", 0.7977, 0.3105, 106.49),
    ("S3", "random word", "random words", 0.7480, 0.3071, 116.92),
    ("S3", "random number", "random numbers", 0.7366, 0.3027, 126.54),
    ("S3", "Wen, target 3", "Wen", 0.7747, 0.3100, 109.28),
    ("S3", "Wen, target 1", "Wen", 0.6038, 0.3050, 136.34),
    ("S3", "Ren", "Ren", 0.6881, 0.3066, 124.38),
    ("S3", "DTP", "paper-dtp", 0.5885, 0.3020, 138.92),
    ("S3", "OG+DTP", "paper-og+dtp", 0.6915, 0.2910, 140.05),
    ("S2", "none", "none", 0.3702, None, 43.35),
    ("S2", "guidance from 700", "", 0.3018, None, 38.86),
    ("S2", "guidance from 600", "", 0.2756, None, 45.73),
)
DIFFERS = (
    "Theirs: other models, prompts and training sets; SSCD (which of its networks, the paper's tables do not say) and another CLIP and "
    "another number of images for FID; their dynamic method needs a complete probing pass. Theirs on one A100: 1.26 s an image, Wen 2.86 s. "
    "On S3 OG+DTP is worse than DTP, and Wen with target 1 is close to DTP. The numbers can be compared as CHANGES "
    "against 'none' of the same table, not as values."
)


def published_table(cells: Mapping[str, Mapping[str, Any]], networks: Mapping[str, str]) -> Table:
    """The paper's numbers beside ours: the change of the 95th percentile against 'none' is what can be compared."""
    before = {setting: value for setting, name, _, value, _, _ in ROWS if name == "none"}
    near = {"random words": "random-words", "random numbers": "random-numbers", "Ren": "ren"}
    p95 = {name: cell["similarity_set"]["p95"] for name, cell in cells.items() if cell.get("similarity_set")}
    rows: list[list[str]] = []
    instead: list[str] = []
    for setting, theirs, ours, value, clip, fid in ROWS:
        names = [n for n in p95 if n.startswith("wen-")] if ours == "Wen" else [near.get(ours, ours)]
        bounded = ours.removeprefix("paper-")
        if ours not in p95 and bounded != ours and bounded in p95:
            names, instead = [bounded], [*instead, f"{bounded} for {ours}"]
        here = [
            f"{n} {p95[n]:.3f}" + (f" ({p95[n] / p95['none'] - 1:+.0%})" if n != "none" and p95["none"] else "")
            for n in names
            if n in p95
        ]
        change = "" if theirs == "none" else f" ({value / before[setting] - 1:+.0%})"
        rows.append(
            [setting, theirs, f"{value:.4f}{change}", number(clip, ".4f"), f"{fid:.2f}", "; ".join(here) or "-"]
        )
    notes = ["; ".join(f"{k}: {v}" for k, v in SETTINGS.items()) + ".", DIFFERS]
    if "similarity_set" in networks:
        notes.append(
            f"Ours: {networks['similarity_set']}, maximum over the whole training set, 95th percentile; in brackets the change."
        )
    if instead:
        notes.append(f"Not run, so another of ours stands there: {', '.join(instead)}.")
    return Table(
        "Published by Jain et al. (theirs) beside ours",
        ["setting (theirs)", "method (theirs)", "Sim95 (theirs)", "CLIP (theirs)", "FID (theirs)", "p95 (ours)"],
        rows,
        notes,
    )
