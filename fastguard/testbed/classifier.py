"""A small classifier of the 225 concepts: whether a picture shows what its caption says.

Input: pictures [B, 3, 32, 32] in -1..1. One drawing of each concept is held out of its training, so that
its accuracy on drawings never seen is known; nearly half of those have a near twin among the drawings seen, so it is told for the others
alone, too. It never sees a generated picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .data import HERE, concepts
from .twins import TWIN, nearest

WEIGHTS = HERE / "classifier.safetensors"
STEPS = 2000
BATCH = 128


class Block(nn.Module):
    """Two convolutions with a shortcut; halves the side."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inside, outside, 3, 2, 1, bias=False)
        self.b = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inside, outside, 1, 2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outside) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inside, n, n] -> [B, outside, n/2, n/2]."""
        y = F.relu(self.norms[0](self.a(x)))
        return F.relu(self.norms[1](self.b(y)) + self.skip(x))


class Classifier(nn.Module):
    """Pictures [B, 3, 32, 32] -> logits [B, 225]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1)
        self.body = nn.Sequential(Block(32, 64), Block(64, 128), Block(128, 192))
        self.head = nn.Linear(192, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(F.dropout(self.body(self.stem(x)).mean((2, 3)), 0.2, self.training))


def load() -> Classifier:
    """The committed classifier, float32, in evaluation mode."""
    model = Classifier(len(concepts()))
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()}, strict=False)
    return model.eval().requires_grad_(False)


def held_out(drawing: np.ndarray, concept: np.ndarray) -> np.ndarray:
    """True for the pictures of one drawing of each concept, chosen by a fixed seed."""
    rng = np.random.default_rng(5)
    chosen = [rng.choice(np.unique(drawing[concept == c])) for c in np.unique(concept)]
    return np.isin(drawing, chosen)


@torch.no_grad()
def reconstructions(work: Path) -> torch.Tensor:
    """All training pictures after the way through the autoencoder, uint8 [N, 3, 32, 32]."""
    from . import unet
    from . import vae as autoencoder

    vae, parts = autoencoder.load(work), unet.latents(work).split(256)
    bar = tqdm(parts, desc="reconstructions", unit="batch", mininterval=10)
    pictures = [vae.decode(z).sample.clamp(-1, 1).add(1).mul(127.5).byte() for z in bar]
    return torch.cat(pictures)


def train(work: Path) -> dict:
    """Train on original and autoencoded pictures; write weights and accuracy."""
    from . import pictures

    torch.manual_seed(1)
    set_, blurred = pictures.build(work), reconstructions(work)
    ordinary = np.arange(len(set_.images)) >= set_.memorized  # memorized pictures are not used
    out = held_out(set_.drawing[ordinary], set_.concept[ordinary])
    index = np.flatnonzero(ordinary)
    seen = torch.from_numpy(index[~out])
    labels = torch.from_numpy(set_.concept)
    model = Classifier(len(concepts())).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=5e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=STEPS)
    for _ in tqdm(range(STEPS), desc="classifier", mininterval=10):
        pick = seen[torch.randint(len(seen), (BATCH,))]
        x = set_.tensor(pick)
        x[: BATCH // 2] = blurred[pick[: BATCH // 2]].float().div(127.5).sub(1)
        x = x + torch.randn_like(x) * 0.1 * torch.rand(BATCH, 1, 1, 1)
        x = torch.roll(x, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        loss = F.cross_entropy(model(x), labels[pick], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plan.step()
    facts = measured(model.eval(), work)
    state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    save_file({k: v.half().contiguous() for k, v in state.items()}, WEIGHTS)
    (HERE / "classifier.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def measured(model: Classifier, work: Path) -> dict:
    """Accuracy on the held-out drawings, on those of them without a near twin among the drawings seen, and on drawings seen."""
    from . import data, pictures

    set_, drawn = pictures.build(work), np.load(data.build(work))
    index = np.arange(set_.memorized, len(set_.images))
    out = held_out(set_.drawing[index], set_.concept[index])
    known = np.isin(np.arange(len(drawn["rgba"])), set_.drawing[index[~out]])
    alone = nearest(drawn["rgba"], drawn["concept"], known)[set_.drawing[index]] >= TWIN
    groups = {
        "held-out drawings": index[out],
        "held-out drawings without a twin": index[out & alone],
        "drawings seen": index[~out][:4000],
    }
    labels = torch.from_numpy(set_.concept)
    return {name: accuracy(model, set_, torch.from_numpy(one), labels) for name, one in groups.items()}


@torch.no_grad()
def accuracy(model: Classifier, set_, index: torch.Tensor, labels: torch.Tensor) -> dict:
    """Top-1 and top-5 accuracy on pictures of the training set."""
    logits = torch.cat([model(set_.tensor(i)) for i in index.split(512)])
    best = logits.topk(5).indices == labels[index, None]
    return {
        "pictures": len(index),
        "top-1": round(best[:, 0].float().mean().item(), 4),
        "top-5": round(best.any(1).float().mean().item(), 4),
    }
