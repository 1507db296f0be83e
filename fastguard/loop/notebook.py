"""Reports as HTML, for notebooks: a table with a line per image, its curve drawn small. No library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastguard.loop.report import ImageReport

WIDTH, HEIGHT = 160, 28  # pixels of a curve
HEAD = "<tr><th>image</th><th>policy</th><th>gate</th><th>what happened</th><th>RMS(c - u), log scale</th><th>rows</th></tr>"


def table(images: Sequence[ImageReport], title: str) -> str:
    """An HTML table of `images` under `title`."""
    lines = "".join(_line(b, image) for b, image in enumerate(images))
    return f"<p>{escape(title)}</p><table>{HEAD}{lines}</table>"


def _line(b: int, image: ImageReport) -> str:
    happened = [image.transition_text()]
    happened += ["suspect"] * bool(image.suspect)
    happened += [f"not finite from row {image.non_finite}"] * (image.non_finite is not None)
    texts = (str(b), str(image.policy.name), image.gate_text(), ", ".join(filter(None, happened)))
    cells = [*map(escape, texts), curve(image.rms_curve), str(image.denoiser_rows)]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def curve(values: Sequence[float | None]) -> str:
    """An SVG polyline of the logarithms of `values` over their index; a gap where there is none. Empty if nothing can be drawn."""
    logs = [math.log(v) if v is not None and 0 < v < math.inf else None for v in values]
    known = [v for v in logs if v is not None]
    if len(known) < 2:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    parts: list[list[str]] = [[]]
    for k, value in enumerate(logs):
        if value is None:
            parts.append([])
        else:
            y = (HEIGHT - 2) * (1 - (value - low) / span) + 1
            parts[-1].append(f"{WIDTH * k / (len(logs) - 1):.1f},{y:.1f}")
    lines = "".join(f'<polyline points="{" ".join(points)}"/>' for points in parts if points)
    return f'<svg width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#1f77b4">{lines}</svg>'
