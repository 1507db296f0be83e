"""`python -m bench paper` as somebody with a model, prompts and training images of their own calls it, networks small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from bench.__main__ import app
from fastguard import testbed


class Pooled(torch.nn.Module):
    """A 4 x 4 thumbnail, centred: a descriptor that knows more than colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return x - x.mean(1, keepdim=True)


class Colours(torch.nn.Module):
    """In place of Inception: mean and deviation of each channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], 1)


def call(given: Path, out: Path, flags: Sequence[str] = (), **changed: Any) -> Any:
    options: dict[str, Any] = {
        "model": testbed.path(),
        "prompts": given / "prompts.jsonl",
        "ordinary": given / "ordinary.jsonl",
        "train-images": given / "train",
        "sscd": given / "sscd.pt",
        "methods": "stp,ren",
        "guidance-scales": "3,7.5",
        "seeds": 2,
        "detection-seeds": 4,
        "steps": 3,
        "batch-size": 8,
        "seconds": 0,
        "device": "cpu",
        "out": out,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    arguments = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return CliRunner().invoke(app, ["paper", *arguments, *flags])


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
