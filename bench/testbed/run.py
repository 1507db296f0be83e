"""Generating many images under a guard and keeping what was measured: resumable, seeds paired."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastguard.testbed import Prompt, classifier, path
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import Sample, generate

BATCH = 32
ELEMENTS = 512  # of a latent


def rms(row: dict, step: int = 0) -> float:
    """RMS(c - u) of a measured row at a denoiser row."""
    return (row["d_curve"][step] / ELEMENTS) ** 0.5


def jobs(prompts: Sequence[Prompt], seeds: int, policy: Any = None) -> list[Sample]:
    """All prompts with all seed numbers 0..seeds-1 under one policy."""
    return [Sample(p, s, policy) for p in prompts for s in range(seeds)]


def folder(work: Path, name: str, *more: bytes) -> Path:
    """A cache that belongs to these weights, the classifier that measures, and `more`: other ones get another place."""
    digest = hashlib.sha256()
    for file in (*sorted(path().rglob("*.safetensors")), classifier.WEIGHTS):
        digest.update(file.read_bytes())
    for one in more:
        digest.update(one)
    return work / f"{name}-{digest.hexdigest()[:12]}"


def run(pipe: Any, judge: Judge, name: str, work: Sequence[Sample], cache: Path, **call: Any) -> list[dict]:
    """Generate and measure `work`; a row of JSON values per image, kept in `cache/name.json`.

    An interrupted run keeps its finished batches. `cache` is a `folder`; `name` says policy and call. ValueError if the file there
    holds other prompts or seeds than `work` begins with: with more seeds, say, the old rows are no prefix of the new ones.
    """
    cache.mkdir(parents=True, exist_ok=True)
    kept_in, rows = cache / f"{name}.json", []
    if kept_in.exists():
        rows = json.loads(kept_in.read_text())[: len(work)]
        for k, (row, job) in enumerate(zip(rows, work, strict=False)):
            kept, wanted = (row["prompt"], row["seed"]), (job.prompt.prompt, job.seed)
            if kept != wanted:
                raise ValueError(
                    f"{kept_in}: row {k} is of {kept}, wanted is {wanted}. Remove the file or use another folder"
                )
    bar = tqdm(total=len(work), initial=len(rows), desc=name, unit="image", mininterval=5)
    while len(rows) < len(work):
        batch = work[len(rows) : len(rows) + BATCH]
        latents, reports = generate(pipe, batch, **call)
        measured = judge(latents, [job.prompt for job in batch])
        for i, job in enumerate(batch):
            rows.append(
                {
                    "prompt": job.prompt.prompt,
                    "kind": job.prompt.kind,
                    "seed": job.seed,
                    "hash": zlib.crc32(latents[i].contiguous().view(torch.uint8).numpy().tobytes()),
                    **{key: values[i] for key, values in measured.items()},
                    **reports[i],
                }
            )
        part = kept_in.with_suffix(".part")
        part.write_text(json.dumps(rows))
        part.replace(kept_in)
        bar.update(len(batch))
    return rows
