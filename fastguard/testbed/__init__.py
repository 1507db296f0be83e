"""The embedded model: a small, genuine StableDiffusionPipeline that really memorizes.

    pipe = fastguard.testbed.load()
    images = pipe([p.prompt for p in fastguard.testbed.prompts("D", "test")]).images

`model/README.md` is its model card, `fastguard demo` shows the guard at work on it. What trained, tuned and evaluated it is
`python -m bench.testbed` of a checkout.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastguard import checks
from fastguard.files import read_json
from fastguard.pipelines.quiet import hushed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["GUIDANCE_SCALE", "Prompt", "concepts", "load", "path", "policy_path", "prompts", "training_images"]

GUIDANCE_SCALE = 3.0
"""The scale that everything here is measured at: at Stable Diffusion's 7.5 this small model over-saturates (docs/testbed)."""

_HERE = Path(__file__).parent
_TILE = 32  # pixels of a training image


@dataclass(frozen=True)
class Prompt:
    """A prompt of the test bed.

    kind    "D": memorized, a plain caption shared with other drawings; "T": memorized, a caption of its
            own; "ordinary"
    half    "tuning" or "test", fixed before any policy was tuned
    factor  copies of the training image in the data; 1 for ordinary prompts
    index   its place in `training_images()`; None for ordinary prompts
    """

    prompt: str
    concept: str
    kind: str
    half: str
    factor: int
    index: int | None

    @property
    def memorized(self) -> bool:
        """True for D and T."""
        return self.index is not None


def path() -> Path:
    """The folder of the pipeline, for `StableDiffusionPipeline.from_pretrained`."""
    return _HERE / "model"


def policy_path() -> Path:
    """The policy that ships with the embedded model: anchored behind a gate that catches 10% of its ordinary tuning images."""
    return _HERE / "policy.json"


def load(**kwargs: Any) -> StableDiffusionPipeline:
    """The pipeline, stored in float16 and loaded in float32; `kwargs` go to from_pretrained."""
    from diffusers import StableDiffusionPipeline

    with hushed():  # it would be said at length that AutoencoderTiny is no AutoencoderKL
        pipe = StableDiffusionPipeline.from_pretrained(path(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def concepts() -> dict[str, str]:
    """Caption -> code point of its drawing, in a fixed order."""
    return read_json(_HERE / "concepts.json")


@functools.cache
def _all_prompts() -> tuple[Prompt, ...]:
    split = read_json(_HERE / "prompts.json")
    found: list[Any] = [(e, e["type"], e["factor"], i) for i, e in enumerate(split["memorized"])]
    found += [(e, "ordinary", 1, None) for e in split["ordinary"]]
    return tuple(Prompt(e["prompt"], e["concept"], kind, e["half"], factor, i) for e, kind, factor, i in found)


def prompts(kind: str | None = None, half: str | None = None) -> list[Prompt]:
    """The prompts of a kind ("D", "T", "memorized", "ordinary"; None: all) and half (None: both)."""
    checks.choice("kind", kind, ("D", "T", "memorized", "ordinary", None))
    checks.choice("half", half, ("tuning", "test", None))
    kinds = {None: ("D", "T", "ordinary"), "memorized": ("D", "T")}.get(kind, (kind,))
    return [p for p in _all_prompts() if p.kind in kinds and half in (None, p.half)]


@functools.cache
def training_images() -> np.ndarray:
    """The duplicated training images, uint8 [60, 32, 32, 3]; `Prompt.index` counts along the first axis."""
    sheet = np.asarray(Image.open(path() / "memorized.png").convert("RGB"))
    tiles = sheet.reshape(sheet.shape[0] // _TILE, _TILE, -1, _TILE, 3).swapaxes(1, 2).reshape(-1, _TILE, _TILE, 3)
    return tiles[: len(prompts("memorized"))]
