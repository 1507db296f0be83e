"""Contact sheets of whole test halves, first seed: nothing picked, for the reader's own eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fastguard.testbed import Prompt, training_images
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import generate

from .run import BATCH, jobs

COLUMNS = 10
SETS = 4  # of training image, no guard, shipped policy in a row of the memorized sheet


def pictures(pipe: Any, judge: Judge, shown: Sequence[Prompt], policy: Any) -> np.ndarray:
    """The first seed's picture of every prompt, uint8 [N, 32, 32, 3]."""
    work = jobs(shown, 1, policy)
    parts = [generate(pipe, work[i : i + BATCH])[0] for i in range(0, len(work), BATCH)]
    return np.concatenate([judge.decode(z).add(1).mul(127.5).byte().permute(0, 2, 3, 1).numpy() for z in parts])


def sheet(path: Path, tiles: Sequence[tuple[str, np.ndarray]], columns: int) -> None:
    """Pictures under their captions, row by row, as PNG."""
    rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(0.95 * columns, 1.12 * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes, tiles, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=6, pad=2)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.14 / (1.12 * rows), 0.06, 0.16)
    figure.savefig(path, dpi=110)


def memorized(path: Path, shown: Sequence[Prompt], plain: np.ndarray, guarded: np.ndarray) -> None:
    """Training image, no guard and the shipped policy side by side, a prompt after the other."""
    tiles = []
    for prompt, before, after in zip(shown, plain, guarded, strict=True):
        assert prompt.index is not None
        tiles += [(prompt.concept, training_images()[prompt.index]), ("no guard", before), ("shipped policy", after)]
    sheet(path, tiles, 3 * SETS)


def ordinary(path: Path, shown: Sequence[Prompt], plain: np.ndarray) -> None:
    """Ordinary prompts under plain guidance."""
    sheet(path, [(prompt.concept, picture) for prompt, picture in zip(shown, plain, strict=True)], COLUMNS)
