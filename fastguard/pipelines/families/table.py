"""The families' files: fields by the family's name; and the functions that they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastguard.pipelines.families.family import Family, ToStep

Kind = TypeVar("Kind", bound=Family)


def _unpacked_video(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    """Tokens to [B, C, F, H, W] without the first frame, which is the user's."""
    size = (given[name] for name in ("num_frames", "height", "width"))
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    return pipe._unpack_latents(output, *size, *patches)[:, :, 1:]


TO_STEP: dict[str, ToStep] = {
    "one frame": lambda pipe, output, given: output.squeeze(2),
    "after the first frame, dimension 1": lambda pipe, output, given: output[:, 1:],  # the first is the user's
    "after the first frame, dimension 2": lambda pipe, output, given: output[:, :, 1:],
    "unpacked, after the first frame": _unpacked_video,
}


def read(file: str, kind: type[Kind]) -> tuple[Kind, ...]:
    families: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name(file).read_text())
    return tuple(
        kind(name=name, **{key: _field(key, value) for key, value in facts.items()}) for name, facts in families.items()
    )


def _field(key: str, value: Any) -> Any:
    if key == "to_step":
        return TO_STEP[value]
    return tuple(value) if isinstance(value, list) else value
