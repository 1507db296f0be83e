"""The families of own combination that are data alone: own.json, fields of `OwnFamily` by the family's name; and the functions it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastguard.pipelines.families.base import Arguments
from fastguard.pipelines.families.own import OwnFamily, Refusal, ToStep
from fastguard.pipelines.families.refused import NO_BRANCH


def _unpacked_video(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    """Tokens to [B, C, F, H, W] without the first frame, which is the user's."""
    size = (given[name] for name in ("num_frames", "height", "width"))
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    return pipe._unpack_latents(output, *size, *patches)[:, :, 1:]


def _distilled(pipe: Any, arguments: Arguments) -> str | None:
    if getattr(pipe.config, "is_distilled", False):
        return f"pipe: this {type(pipe).__name__} is distilled (is_distilled): {NO_BRANCH}; the base model has one"
    return None


def _free_init(pipe: Any, arguments: Arguments) -> str | None:
    if getattr(pipe, "free_init_enabled", False):
        return (
            "enable_free_init: its loop runs several times, and the guard's state would begin anew; disable_free_init()"
        )
    return None


TO_STEP: dict[str, ToStep] = {
    "one frame": lambda pipe, output, given: output.squeeze(2),
    "after the first frame, dimension 1": lambda pipe, output, given: output[:, 1:],  # the first is the user's
    "after the first frame, dimension 2": lambda pipe, output, given: output[:, :, 1:],
    "unpacked, after the first frame": _unpacked_video,
}
REFUSED: dict[str, Refusal] = {"distilled": _distilled, "free init": _free_init}


def _family(name: str, facts: dict[str, Any]) -> OwnFamily:
    functions: dict[str, Any] = {"to_step": TO_STEP, "refused": REFUSED}
    named = {key: table[facts[key]] for key, table in functions.items() if key in facts}
    tuples = {key: tuple(value) for key, value in facts.items() if isinstance(value, list)}
    return OwnFamily(name=name, **{**facts, **tuples, **named})


TABLE = tuple(
    _family(name, facts) for name, facts in json.loads(Path(__file__).with_name("own.json").read_text()).items()
)
