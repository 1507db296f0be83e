"""What a model has memorized, prompt by prompt: RMS(c - u) at the first step, over the same few noises for every prompt.

One image's value depends on its noise; the mean over 4 to 8 noises tells memorized prompts from ordinary ones better, and costs a row pair
of the denoiser each. Noise k of every prompt is that of the generator seeded with seed + k. The value belongs to a prompt, a negative
prompt, a size and a number of steps; the guidance scale has no part in it.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fastguard.batch.planning import arguments
from fastguard.batch.request import Request, ungated
from fastguard.files import JsonLines, whole_lines
from fastguard.pipelines.statistics import early_reports
from fastguard.policies.policy import Policy
from fastguard.policies.presets import PRESETS

FORMAT = "fastguard_screen"
Key: TypeAlias = tuple[str, str | None, int, int | None, int | None]


def key(request: Request) -> Key:
    """What the statistic belongs to."""
    return request.prompt, request.negative_prompt, request.steps, request.height, request.width


def statistics(pipe: Any, batch: Sequence[Request], noises: int, *, seed: int = 0, most: int) -> list[list[float]]:
    """RMS(c - u) at the first step of requests of one shape, for each noise: [len(batch)][noises]. most: images per call of the pipeline.

    A guard that was on comes back. ValueError for outputs that are not finite.
    """
    each = [request for request in batch for _ in range(noises)]
    seeds = [seed + k for _ in batch for k in range(noises)]
    call = arguments(each, scale=batch[0].stock_scale)
    values = [image.gate["rms"] for image in early_reports(pipe, seeds=seeds, batch_size=most, **call)]
    return [values[i : i + noises] for i in range(0, len(values), noises)]


def elsewhere(request: Request) -> str | None:
    """What to tell of a request whose policy's bound was found with another negative prompt or size; None if there is nothing to tell."""
    known = request.policy.provenance
    own = {name: getattr(request, name) for name in ("negative_prompt", "width", "height")}
    differ = [f"{name}={known[name]!r}, not {own[name]!r}" for name in own if known.get(name, own[name]) != own[name]]
    if not differ or "screen" not in known:
        return None
    return f"policy {request.policy.name!r}: its bound for screening was found with {' and '.join(differ)}"


def decided(policy: Policy, flagged: bool) -> Policy:
    """What an image gets whose prompt was screened: its policy without the gate, or plain guidance."""
    if flagged:
        return ungated(policy)
    return dataclasses.replace(PRESETS["cfg"], guidance_scale=policy.guidance_scale, suspect=policy.suspect)


class Journal:
    """Prompts that are done, on the disk as soon as they are: a killed screening goes on from there.

    settings   what the values depend on; ValueError if the file holds values of others
    done       the values of (prompt, negative prompt)
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, head = path, {FORMAT: 2, **settings}
        lines = [json.loads(line) for line in whole_lines(path)]
        if lines and lines[0] != head:
            raise ValueError(f"{path}: holds values of other settings: {lines[0]}; remove it, or screen with those")
        self.done = {(line["prompt"], line["negative_prompt"]): line["values"] for line in lines[1:]}
        self._file = JsonLines(path)
        if not lines:
            self._file.add([head])

    def add(self, found: Iterable[tuple[Request, list[float]]]) -> None:
        own = {(request.prompt, request.negative_prompt): values for request, values in found}
        self.done |= own
        self._file.add({"prompt": prompt, "negative_prompt": text, "values": own[prompt, text]} for prompt, text in own)

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()
