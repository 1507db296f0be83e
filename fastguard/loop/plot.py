"""The curves of d as a picture. Needs matplotlib: the optional extra `plot`."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastguard.files import write_atomic

if TYPE_CHECKING:
    from fastguard.loop.report import ImageReport


def plot_curves(images: Sequence[ImageReport], path: str | os.PathLike[str] | None = None) -> Any:
    """RMS(c - u) = sqrt(d / elements) over the timestep, one line per image, on a logarithmic axis.

    Of anchored images the share of the guidance that leads to the anchor, dashed, on an axis of its own to the right. A dot marks the
    transition (hollow: forced by the deadline), a triangle the minimum that fired it, a dashed line the gate's threshold.
    Returns the matplotlib Figure; saves it to `path` if one is given. ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'diffusers-fastguard[plot]'") from error

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")  # no pyplot: no global state, no display
    axes = figure.add_subplot(xlabel="timestep t", ylabel="RMS(c - u)")
    axes.set_title("Guidance difference; dots: transition, triangles: minimum")
    shared = any(share is not None for image in images for share in image.share_curve)
    right = axes.twinx() if shared else None
    for b, image in enumerate(images):
        colour, label = f"C{b % 10}", f"{b}: {image.policy.name}"
        # Small dots: between two gaps there is no line to see.
        # None becomes NaN: a gap.
        curve, shares = (np.array(values, float) for values in (image.rms_curve, image.share_curve))
        axes.plot(image.timesteps, curve, lw=1.2, marker=".", ms=2, color=colour, label=label)
        _mark(axes, image, image.transition_step, "o", colour, "white" if image.forced else colour)
        _mark(axes, image, image.minimum_step, "v", colour, colour)
        if right is not None:
            right.plot(image.timesteps, shares, ls="--", lw=1, color=colour)
    gates = {(image.gate["threshold"], image.policy.gate_steps) for image in images if image.gate is not None}
    for tau, steps in sorted(gates):
        axes.axhline(tau, ls="--", lw=1, color="0.4")
        text = f"gate {tau:.3g}, compared at the first {'step' if steps == 1 else f'{steps} steps'} alone"
        axes.annotate(text, (0.99, tau), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.3")
    if any(r for image in images for r in image.rms_curve):
        axes.set_yscale("log")
    axes.invert_xaxis()
    if right is not None:
        right.set_ylabel("share of the guidance that leads to the anchor (dashed)")
    if 0 < len(images) <= 12:
        axes.legend(fontsize="small")
    if path is not None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=Path(path).suffix[1:] or "png", dpi=150)
        write_atomic(path, buffer.getvalue())
    return figure


def _mark(axes: Any, image: ImageReport, row: int | None, marker: str, colour: str, face: str) -> None:
    if row is None:
        return
    height, t = image.rms_curve[row], image.timesteps[row]
    if height is None:  # the branch was not run there: a vertical line instead of a point
        axes.axvline(t, color=colour, lw=0.8, ls=":")
    else:
        axes.plot([t], [height], marker, color=colour, ms=6, mfc=face)
