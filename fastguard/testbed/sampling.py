"""Images of the embedded model under a guard, the same noise for the same prompt and seed whatever the guard."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastguard.pipelines.guard import enable

from . import GUIDANCE_SCALE, Prompt

CALL = {"num_inference_steps": 50, "guidance_scale": GUIDANCE_SCALE}


@dataclass(frozen=True)
class Sample:
    """One image: a prompt, a seed number, a policy (a preset's name or a Policy; None: stock)."""

    prompt: Prompt
    seed: int
    policy: Any = None


def generator(job: Sample) -> torch.Generator:
    """The same noise for the same prompt and seed number, whatever the policy."""
    return torch.Generator().manual_seed(100_003 * job.seed + zlib.crc32(job.prompt.prompt.encode()))


def generate(pipe: Any, batch: Sequence[Sample], **call: Any) -> tuple[torch.Tensor, list[dict]]:
    """Latents [B, 8, 8, 8] and, per image, what the guard reports (empty without one)."""
    arguments = {"prompt": [job.prompt.prompt for job in batch], "generator": [generator(job) for job in batch]}
    arguments |= {"output_type": "latent", **CALL, **call}
    if all(job.policy is None for job in batch):
        return pipe(**arguments).images, [{} for _ in batch]
    with enable(pipe, [job.policy for job in batch]) as guard:
        images = pipe(**arguments).images
        return images, [one.to_dict() for one in guard.report]
