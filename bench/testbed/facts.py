"""Numbers that FINDINGS.md quotes and no table shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastguard.policies.gate import calibrate
from fastguard.testbed.sampling import Sample, generate

from .run import BATCH, rms
from .stats import intraclass, over_prompts
from .tune import first_differences, tuning_folder


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


def behind_the_gate(rows: Sequence[dict]) -> dict:
    """What becomes of the images that the gate catches."""
    caught = [r for r in rows if r["gate"]["caught"]]
    return {
        "caught": over_prompts([r | {"caught": bool(r["gate"]["caught"])} for r in rows], "caught"),
        "copies of the caught": over_prompts(caught, "copy"),
        "the deadline decides": over_prompts([r | {"forced": bool(r["forced"])} for r in caught], "forced"),
    }


def calibration(pipe: Any, work: Path, memorized: Sequence[dict], ordinary: Sequence[dict]) -> dict:
    """How alike the calibration prompts of one concept are, and the gate that was withdrawn: the one that counts them as independent.

    `memorized` and `ordinary` are the unguarded images of the test halves.
    """
    values, concepts = first_differences(pipe, tuning_folder(work))
    gate = calibrate(values, 0.01, 0.95).threshold
    touched = Counter(r["prompt"] for r in ordinary if rms(r) >= gate)
    return {
        "prompts": len(values),
        "concepts": len(set(concepts)),
        "intraclass correlation": intraclass(values, concepts),
        "largest": max(values),
        "withdrawn gate": {
            "threshold": gate,
            "memorized images caught": float(np.mean([rms(r) >= gate for r in memorized])),
            "ordinary images touched": sum(touched.values()),
            "of them": dict(touched.most_common()),
        },
    }


def from_stock(pipe: Any, stock: Sequence[Sample], plain: Sequence[Sample]) -> dict:
    """The largest difference of a latent's element between stock diffusers and policy `cfg`, one batch."""
    a, b = (generate(pipe, some[:BATCH])[0] for some in (stock, plain))
    return {"images": len(a), "largest": float((a - b).abs().max())}
