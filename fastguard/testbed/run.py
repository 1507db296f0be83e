"""Generating many images under a guard and keeping what was measured: resumable, seeds paired."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import GUIDANCE_SCALE, Prompt, classifier
from . import path as model_path
from .measures import Judge

BATCH = 32
ELEMENTS = 512  # of a latent
CALL = {"num_inference_steps": 50, "guidance_scale": GUIDANCE_SCALE}
REPORTED = (
    "transition_step",
    "transition_timestep",
    "minimum_timestep",
    "margin",
    "forced",
    "gate",
)


@dataclass(frozen=True)
class Job:
    """One image: a prompt, a seed number, a policy (a preset's name or a Policy; None: stock)."""

    prompt: Prompt
    seed: int
    policy: Any = None


def generator(job: Job) -> torch.Generator:
    """The same noise for the same prompt and seed number, whatever the policy."""
    return torch.Generator().manual_seed(100_003 * job.seed + zlib.crc32(job.prompt.prompt.encode()))


def rms(row: dict, step: int = 0) -> float:
    """RMS(c - u) of a measured row at a denoiser row."""
    return (row["d_curve"][step] / ELEMENTS) ** 0.5


def jobs(prompts: Sequence[Prompt], seeds: int, policy: Any = None) -> list[Job]:
    """All prompts with all seed numbers 0..seeds-1 under one policy."""
    return [Job(p, s, policy) for p in prompts for s in range(seeds)]


def generate(pipe: Any, batch: Sequence[Job], **call: Any) -> tuple[torch.Tensor, list[dict]]:
    """Latents [B, 8, 8, 8] and, per image, what the guard reports (empty without one)."""
    import fastguard

    arguments = {
        "prompt": [job.prompt.prompt for job in batch],
        "generator": [generator(job) for job in batch],
        "output_type": "latent",
        **CALL,
        **call,
    }
    if all(job.policy is None for job in batch):
        return pipe(**arguments).images, [{} for _ in batch]
    guard = fastguard.enable(pipe, [job.policy for job in batch])
    try:
        images = pipe(**arguments).images
        return images, [record(one) for one in guard.report]
    finally:
        guard.disable()


def record(report: Any) -> dict:
    """The fields of an image's report that the tables need, as JSON values."""
    return {
        **{name: getattr(report, name) for name in REPORTED},
        "d_curve": list(report.d_curve),
        "timesteps": [float(t) for t in report.timesteps],
        "denoiser_rows": report.denoiser_rows,
    }


def folder(work: Path, name: str, *more: bytes) -> Path:
    """A cache that belongs to these weights, the classifier that measures, and `more`: other ones get another place."""
    digest = hashlib.sha256()
    for file in (*sorted(model_path().rglob("*.safetensors")), classifier.WEIGHTS):
        digest.update(file.read_bytes())
    for one in more:
        digest.update(one)
    return work / f"{name}-{digest.hexdigest()[:12]}"


def run(pipe: Any, judge: Judge, name: str, work: Sequence[Job], cache: Path, **call: Any) -> list[dict]:
    """Generate and measure `work`; a row of JSON values per image, kept in `cache/name.json`.

    An interrupted run keeps its finished batches. `cache` is a `folder`; `name` says policy and call. ValueError if the file there
    holds other prompts or seeds than `work` begins with: with more seeds, say, the old rows are no prefix of the new ones.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path, rows = cache / f"{name}.json", []
    if path.exists():
        rows = json.loads(path.read_text())[: len(work)]
        for k, (row, job) in enumerate(zip(rows, work, strict=False)):
            kept, wanted = (row["prompt"], row["seed"]), (job.prompt.prompt, job.seed)
            if kept != wanted:
                raise ValueError(
                    f"{path}: row {k} is of {kept}, wanted is {wanted}. Remove the file or use another folder"
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
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rows))
        part.replace(path)
        bar.update(len(batch))
    return rows
