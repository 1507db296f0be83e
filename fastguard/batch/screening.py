"""What a model has memorized, prompt by prompt: RMS(c - u) at the first step, over the same few noises for every prompt.

One image's value depends on its noise; the mean over 4 to 8 noises tells memorized prompts from ordinary ones better, and costs a row pair
of the denoiser each. Noise k of every prompt is that of the generator seeded with seed + k.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastguard import checks
from fastguard.batch.growing import Growing
from fastguard.batch.prompt_files import Source
from fastguard.batch.request import SEEDS
from fastguard.batch.tables import Problem, Prompts, rows
from fastguard.policies.gate import UNREACHED

NOISES = 4
FORMAT = "fastguard_screen"


def distinct_prompts(prompts: Prompts) -> list[str]:
    """The distinct prompts of any table that `generate` reads, in their order; other columns are ignored. ValueError for a bad row."""
    source = Source.of(prompts)
    found: dict[str, None] = {}
    for number, row in rows(prompts, None):
        message = row.message if isinstance(row, Problem) else None
        prompt = None if isinstance(row, Problem) else row.get("prompt")
        if message is None and (not isinstance(prompt, str) or not prompt.strip()):
            message = f"prompt={prompt!r}: must be text that is not empty"
        if message is not None:
            raise ValueError(f"{source.name}: {source.unit} {number}: {message}")
        found.setdefault(str(prompt).strip())
    if not found:
        raise ValueError(f"{source.name}: there is no prompt in it")
    return list(found)


def statistics(
    pipe: Any,
    prompts: Sequence[str],
    *,
    noises: int = NOISES,
    seed: int = 0,
    batch_size: int = 8,
    each: Callable[[str, list[float]], None] = lambda prompt, values: None,
    **call: Any,
) -> list[list[float]]:
    """Per prompt, RMS(c - u) at the first step for each noise: [len(prompts)][noises].

    batch_size   images per call of the pipeline, in whole prompts, one at least
    each         told of every prompt when it is done
    call         of the pipeline: num_inference_steps, guidance_scale, negative_prompt (of all), height ...

    A guard that was on comes back. ValueError for numbers that are not allowed, a scale without a second branch, or outputs that are
    not finite.
    """
    import torch

    import fastguard

    checks.integer("noises", noises, 1, 1000)
    checks.integer("seed", seed, 0, SEEDS - noises)
    if not call.get("guidance_scale", 7.5) > 1:
        raise ValueError(
            f"guidance_scale={call['guidance_scale']!r}: must be above 1, else there is no second branch to compare with"
        )

    def stop(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = True
        return values

    negative = call.pop("negative_prompt", None)
    at_once = max(1, batch_size // noises)
    found: list[list[float]] = []
    try:
        with fastguard.enable(pipe, "paper-dtp", gate=UNREACHED) as guard:
            for start in range(0, len(prompts), at_once):
                part = prompts[start : start + at_once]
                text: dict[str, Any] = {"prompt": [prompt for prompt in part for _ in range(noises)]}
                if negative is not None:
                    text["negative_prompt"] = [negative] * len(text["prompt"])
                pipe(
                    **text,
                    generator=[torch.Generator().manual_seed(seed + k) for _ in part for k in range(noises)],
                    output_type="latent",
                    callback_on_step_end=stop,
                    **call,
                )
                values = [image.gate["rms"] if image.gate else None for image in guard.report or ()]
                for i, prompt in enumerate(part):
                    own = [value for value in values[i * noises : (i + 1) * noises] if value is not None]
                    if len(own) < noises:
                        raise ValueError(f"prompt {prompt!r}: cond or uncond is not finite, so it has no statistic")
                    found.append(own)
                    each(prompt, own)
    finally:
        pipe._interrupt = False
    return found


class Journal:
    """Prompts that are done, on the disk as soon as they are: a killed screening goes on from there.

    settings   what the values depend on; ValueError if the file holds values of others
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.done = path, dict[str, list[float]]()
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last may be torn
        if whole:
            head = json.loads(whole[0])
            if head != {FORMAT: 1, **settings}:
                raise ValueError(f"{path}: holds values of other settings: {head}; remove it, or screen with those")
            self.done = {line["prompt"]: line["values"] for line in map(json.loads, whole[1:])}
        self._file = Growing(path, sum(map(len, whole)))
        if not whole:
            self._append({FORMAT: 1, **settings})

    def add(self, prompt: str, values: Iterable[float]) -> None:
        self.done[prompt] = list(values)
        self._append({"prompt": prompt, "values": self.done[prompt]})

    def _append(self, line: dict[str, Any]) -> None:
        self._file.append((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()
