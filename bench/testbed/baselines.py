"""What the measures say about pairs of real pictures: where the thresholds come from.

Needs the drawings, so it is measured where they are (the work folder) and kept in a committed file.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fastguard.testbed.measures import BLOWN, COPY, LOUD, Judge, distance, similarity, to_tensor

from .twins import TWIN, nearest

COMMITTED = (
    Path(__file__).parents[2] / "docs" / "testbed" / "baselines.json"
)  # of a clone; an installed package has none


def spread(values: torch.Tensor) -> dict:
    """Quantiles of a measure."""
    names = {"min": 0, "p1": 0.01, "median": 0.5, "p99": 0.99, "max": 1}
    return {k: round(float(values.quantile(q)), 3) for k, q in names.items()}


@torch.no_grad()
def measure(judge: Judge, work: Path) -> dict:
    """Distances and similarities of the training images to other pictures, and of real pictures' cycles."""
    from . import data, pictures

    set_, drawn = pictures.build(work), np.load(data.build(work))
    rng, count = np.random.default_rng(8), set_.memorized
    rgba, target = drawn["rgba"], judge.targets

    def fresh(drawing: np.ndarray, k: int) -> torch.Tensor:
        made = [data.augment(rgba[i], (55, int(i), k)) for i in drawing]
        return judge.encode(to_tensor(np.stack(made)))

    own = set_.drawing[:count]
    apart = nearest(rgba, drawn["concept"])
    groups: dict = {"same drawing, augmented again": [], "same caption, other drawing": []}
    groups["random picture"] = []
    for k in range(4):
        other = [
            rng.choice(np.flatnonzero((drawn["concept"] == c) & (np.arange(len(rgba)) != i)))
            for i, c in zip(own, set_.concept[:count], strict=True)
        ]
        anything = rng.integers(0, len(rgba), count)
        for name, chosen in zip(groups, (own, np.array(other), anything), strict=True):
            groups[name].append(fresh(chosen, k))
    result: dict = {
        "thresholds": {"COPY": COPY, "BLOWN": BLOWN, "LOUD": LOUD, "TWIN": TWIN},
        "twins": {
            "drawings": len(rgba),
            "with a twin": int((apart < TWIN).sum()),
            "memorized": {
                prompt: round(float(d), 1)
                for prompt, d in zip(set_.prompt, apart[own], strict=False)
                if d < TWIN and prompt is not None
            },
        },
    }
    for name, parts in groups.items():
        z = torch.cat(parts)
        goal = target.repeat(4, 1, 1, 1)
        far = distance(z, goal)
        result[name] = {
            "distance": spread(far),
            "similarity": spread(similarity(z, goal)),
            "below COPY": float((far < COPY).float().mean()),
        }
    real = judge.encode(set_.tensor(torch.arange(count, count + 4000, 4)))
    for name, z in (
        ("training pictures", real),
        ("pure noise as a latent", torch.randn(500, 8, 8, 8, generator=torch.manual_seed(0))),
    ):
        cycle = distance(judge.encode(judge.decode(z)), z)
        loud = z.square().flatten(1).mean(1).sqrt()
        result[name] = {
            "cycle": spread(cycle),
            "rms": spread(loud),
            "blown": float(((cycle > BLOWN) | (loud > LOUD)).float().mean()),
        }
    return result


def baselines(judge: Judge, work: Path, path: Path) -> dict:
    """Measured where the drawings are and written to `path`; else read from there, or from the committed file."""
    if (work / "drawings.npz").exists():
        path.write_text(json.dumps(measure(judge, work), indent=1) + "\n")
    known = next((p for p in (path, COMMITTED) if p.exists()), None)
    if known is None:
        raise FileNotFoundError(
            f"no drawings in {work}, nor {path}, nor {COMMITTED}: `python -m bench.testbed data` fetches the drawings"
        )
    return json.loads(known.read_text())
