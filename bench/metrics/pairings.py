"""Which training image a generated image is compared with, and the numbers that are reported of a set of similarities.

For descriptors of unit length the similarity of images i and j is s_ij = <a_i, b_j>.

- own        max over the training images of the prompt (Wen et al., ICLR 2024)
- whole_set  max over all training images (Somepalli et al., CVPR 2023; Jain et al., CVPR 2025)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHARE_ABOVE = 0.5  # SSCD: a copy, Somepalli et al. and Jain et al.
BLOCK = 4096


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """<a_i, b_j> / (|a_i| |b_j|): [N, D], [M, D] -> float32 [N, M]. Zero vectors have similarity 0."""

    def unit(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.float32)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return unit(a) @ unit(b).T


def own(generated: np.ndarray, training: np.ndarray, indices: Sequence[Sequence[int]]) -> list[float | None]:
    """Per generated image the maximum over its own prompt's training images, `indices[i]`; None where it has none."""
    if not any(indices):
        return [None for _ in indices]
    similarity = cosine(generated, training)
    return [float(row[list(chosen)].max()) if chosen else None for row, chosen in zip(similarity, indices, strict=True)]


def whole_set(generated: np.ndarray, training: np.ndarray) -> list[float]:
    """Per generated image the maximum over all training images."""
    best = np.full(len(generated), -np.inf, np.float32)
    for start in range(0, len(training), BLOCK):
        best = np.maximum(best, cosine(generated, training[start : start + BLOCK]).max(1))
    return [float(value) for value in best]


def summary(values: Sequence[float | None]) -> dict[str, float] | None:
    """95th percentile (linear interpolation), mean and share above 0.5; None if no value is known."""
    known = np.array([v for v in values if v is not None], float)
    if not len(known):
        return None
    return {
        "p95": float(np.percentile(known, 95)),
        "mean": float(known.mean()),
        "above": float((known > SHARE_ABOVE).mean()),
        "images": len(known),
    }
