"""Numbers of the curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def minima(rows: Sequence[dict]) -> dict:
    """Where the paper's bare rule fires, and how far the minimum (one row before) lies below the lower of its neighbours."""
    fired = [r for r in rows if r["transition_step"] is not None]
    depth = []
    for row in fired:
        before, low, after = row["d_curve"][row["transition_step"] - 2 : row["transition_step"] + 1]
        depth.append(1 - low / min(before, after))
    return {
        "fired": len(fired) / len(rows),
        "t, quartiles": np.percentile([r["transition_timestep"] for r in fired], [75, 50, 25]).tolist(),
        "less than 1% deep": float(np.mean(np.array(depth) < 0.01)),
    }


def medians(never: Sequence[dict], noise: np.ndarray) -> dict:
    """Median over the images of d at every row under zero guidance, and of d in x0 space."""
    d = np.array([r["d_curve"] for r in never], float)
    return {
        "t": never[0]["timesteps"],
        "d": [float(f"{v:.4g}") for v in np.median(d, 0)],
        "d in x0 space": [float(f"{v:.4g}") for v in np.median(d * noise, 0)],
    }
