"""A small classifier of the 225 concepts: whether a picture shows what its caption says.

Input: pictures [B, 3, 32, 32] in -1..1. It was trained on drawings alone, by `python -m bench.testbed classifier` of a checkout, and
never saw a generated or a memorized picture.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from . import concepts

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


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
        return self.head(F.dropout(self.body(self.stem(x)).mean((2, 3)), 0.2, self.training))


def load() -> Classifier:
    """The committed classifier, float32, in evaluation mode."""
    model = Classifier(len(concepts()))
    model.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()}, strict=False)
    return model.eval().requires_grad_(False)
