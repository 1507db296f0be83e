"""Training of the classifier that measures whether a picture shows its caption.

One drawing of each concept is held out, so that its accuracy on drawings never seen is known; nearly half of those have a near twin among
the drawings seen, so it is told for the others alone, too. It never sees a generated picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from fastguard.testbed import concepts
from fastguard.testbed.classifier import Classifier

from . import data, pictures, unet, vae
from .twins import TWIN, nearest

STEPS = 2000
BATCH = 128


def held_out(drawing: np.ndarray, concept: np.ndarray) -> np.ndarray:
    """True for the pictures of one drawing of each concept, chosen by a fixed seed."""
    rng = np.random.default_rng(5)
    chosen = [rng.choice(np.unique(drawing[concept == c])) for c in np.unique(concept)]
    return np.isin(drawing, chosen)


@torch.no_grad()
def reconstructions(work: Path) -> torch.Tensor:
    """All training pictures after the way through the autoencoder, uint8 [N, 3, 32, 32]."""
    autoencoder, parts = vae.load(work), unet.latents(work).split(256)
    bar = tqdm(parts, desc="reconstructions", unit="batch", mininterval=10)
    return torch.cat([autoencoder.decode(z).sample.clamp(-1, 1).add(1).mul(127.5).byte() for z in bar])


def train(work: Path, out: Path) -> dict:
    """Train on original and autoencoded pictures; write classifier.safetensors and its accuracy, classifier.json, to `out`."""
    torch.manual_seed(1)
    set_, blurred = pictures.build(work), reconstructions(work)
    ordinary = np.arange(len(set_.images)) >= set_.memorized  # memorized pictures are not used
    held = held_out(set_.drawing[ordinary], set_.concept[ordinary])
    seen = torch.from_numpy(np.flatnonzero(ordinary)[~held])
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
    save_file({k: v.half().contiguous() for k, v in state.items()}, out / "classifier.safetensors")
    (out / "classifier.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def measured(model: Classifier, work: Path) -> dict:
    """Accuracy on the held-out drawings, on those of them without a near twin among the drawings seen, and on drawings seen."""
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
