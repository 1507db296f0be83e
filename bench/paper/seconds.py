"""Seconds of a method over those of plain guidance: the same batch by turns in one process, kept in seconds.json as the run goes on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.methods import Method
from bench.pairs import alternating
from bench.paper.inputs import Item
from bench.paper.work import PLAIN, WATCHED, generator
from fastguard.files import read_json, write_json

FILE = "seconds.json"
IMAGES = 4  # at once


def measure(
    out: Path, pipe: Any, methods: Mapping[str, Method], items: Sequence[Item], pairs: int, steps: int, scale: float
) -> None:
    """The ratios of every method that the file lacks, plain guidance's over itself too: what the machine did meanwhile.

    Wen's and han-sample's depend on how soon they reach their targets on this batch.
    """
    found = read(out)
    batch = [item for item in items if item.group == "memorized"][:IMAGES]

    def call(method: Method) -> None:
        method(
            pipe,
            [item.prompt for item in batch],
            [generator(item, 0) for item in batch],
            num_inference_steps=steps,
            guidance_scale=scale,
        )

    todo = [name for name in methods if name != WATCHED and len(found.get(name, [])) < pairs]
    for name in tqdm(todo if pairs else [], desc="seconds", unit="method"):
        ratios = alternating(lambda one=methods[name]: call(one), lambda: call(methods[PLAIN]), pairs=pairs)  # type: ignore[misc]
        found[name] = list(ratios.values)
        write_json(out / FILE, found)


def read(out: Path) -> dict[str, list[float]]:
    """The ratios by method; empty where none were measured."""
    path = out / FILE
    return dict(read_json(path)) if path.exists() else {}


def summary(ratios: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of pairs."""
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"median": middle, "low": low, "high": high, "pairs": len(ratios)}
