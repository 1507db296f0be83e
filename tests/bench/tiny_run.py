"""A run of the benchmark's loop with a method that needs no model: `python -m tests.bench.tiny_run OUT PROCESSES [TROUBLE]`.

TROUBLE  "killed": SIGKILL for the process that makes the method "other"; "cannot start": no process can load what it needs
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from bench.paper.inputs import BadInput, Item
from bench.paper.parallel import workers
from bench.paper.store import Store
from bench.paper.work import Amount, Made, Unit, make, run, units

ITEMS = [Item("memorized", f"m{i}", f"prompt {i}", "memorized") for i in range(7)]
ITEMS += [Item("ordinary", f"o{i}", f"other {i}", "ordinary") for i in range(4)]
METHODS = ("none", "first-look", "other")
AMOUNT = Amount(scale=7.5, scales=(2.0, 7.5), seeds=3, ordinary=1, detection=4, batch=5)


class Fake:
    """Latents that depend on prompt, generator, scale and the global generator, as a method of the benchmark's might."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, pipe: Any, prompts: Sequence[str], generators: Sequence[torch.Generator], **call: Any) -> Any:
        time.sleep(0.002)
        z = torch.stack([torch.randn(1, 4, 4, generator=g) for g in generators]) * call["guidance_scale"] + torch.rand(
            1
        )
        return SimpleNamespace(latents=z, rows=2 * len(prompts), seconds=0.1, details=[{"p": p} for p in prompts])


class Mean:
    networks = {"mean": "none"}

    def __call__(self, pictures: Any, latents: torch.Tensor, items: Any) -> dict[str, list[Any]]:
        return {"mean": latents.flatten(1).mean(1).tolist()}


def decode(z: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(x[0].mul(10).clamp(0, 255).byte().numpy()) for x in z]


def prepare(trouble: str = "") -> Callable[[Unit], Made]:
    if trouble == "cannot start":
        raise BadInput("prompts", ["they were there before"])
    methods: dict[str, Any] = {name: Fake(name) for name in METHODS}

    def make_one(unit: Unit) -> Made:
        if trouble == "killed" and unit.method == "other":
            time.sleep(1)  # the other process finishes what it is at
            os.kill(os.getpid(), signal.SIGKILL)
        return make(None, methods[unit.method], unit, [Mean()], decode, 3)

    return make_one


def main(out: Path, processes: int = 1, trouble: str = "") -> None:
    with Store(out) as store:
        store.clean()
        print("ready", flush=True)
        work = units(ITEMS, METHODS, AMOUNT)
        if processes > 1:
            with workers(partial(prepare, trouble), processes) as make_all:
                run(work, make_all, store)
        else:
            run(work, partial(map, prepare(trouble)), store)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
