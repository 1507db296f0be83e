"""The training set: augmented pictures with captions and the number of copies of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastguard.testbed import concepts

from . import data
from .split import TEMPLATES, make

VARIANTS = 16  # augmented pictures of every ordinary drawing
SEED = 7


@dataclass(frozen=True)
class Pictures:
    """Pictures [N, 32, 32, 3] uint8 with, for each, its concept, its copies and its own prompt.

    `prompt[i]` is None for an ordinary picture: each time it is drawn it takes a template at random.
    The memorized pictures come first, in the order of `prompts.json`.
    """

    images: np.ndarray
    concept: np.ndarray
    drawing: np.ndarray
    copies: np.ndarray
    prompt: list[str | None]
    memorized: int

    def tensor(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Pictures as float32 [B, 3, 32, 32] in -1..1, channels last."""
        images = torch.from_numpy(self.images[index])
        return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)

    def captions(self) -> list[list[str]]:
        """The captions that each picture may carry."""
        names = list(concepts())
        return [
            [own] if own else [t.format(x=names[c]) for t in TEMPLATES]
            for own, c in zip(self.prompt, self.concept, strict=True)
        ]


def build(work: Path, split: Sequence[dict] | None = None, seed: int = SEED, file: str = "pictures.npz") -> Pictures:
    """Augment everything (cached in `work` as `file`). split: the memorized entries, the shipped model's unless given."""
    drawn = np.load(data.build(work))
    rgba, concept, style = drawn["rgba"], drawn["concept"], drawn["style"]
    names = list(concepts())
    split = make()["memorized"] if split is None else split
    taken = []
    for entry in split:
        hit = (concept == names.index(entry["concept"])) & (style == entry["set"])
        taken.append(int(np.flatnonzero(hit)[0]))
    rest = [i for i in range(len(rgba)) if i not in set(taken)]

    target = work / file
    if not target.exists():
        jobs = [(i, 10_000) for i in taken] + [(i, k) for i in rest for k in range(VARIANTS)]
        bar = tqdm(jobs, desc="pictures", unit="picture", mininterval=2)
        images = np.stack([data.augment(rgba[i], (seed, i, k)) for i, k in bar])
        part = target.with_suffix(".part.npz")
        np.savez(part, images=images)
        part.replace(target)
    images = np.load(target)["images"]
    drawing = np.array(taken + [i for i in rest for _ in range(VARIANTS)])
    ordinary = len(images) - len(taken)
    return Pictures(
        images=images,
        concept=concept[drawing],
        drawing=drawing,
        copies=np.array([e["factor"] for e in split] + [1] * ordinary),
        prompt=[e["prompt"] for e in split] + [None] * ordinary,
        memorized=len(taken),
    )


def statistics(pictures: Pictures) -> dict:
    """Sizes that the model card states."""
    copies = int(pictures.copies[: pictures.memorized].sum())
    return {
        "drawings": len(set(pictures.drawing.tolist())),
        "pictures": len(pictures.images),
        "copies": copies,
        "share": copies / int(pictures.copies.sum()),
    }


def describe(work: Path) -> str:
    """One line of JSON about the training set."""
    return json.dumps(statistics(build(work)))
