"""The prompts of the scenario: the twenty captions as memorized ones, the embedded model's ordinary test prompts beside them."""

from __future__ import annotations

import hashlib

from PIL import Image

from bench.paper import inputs
from bench.paper.inputs import Item, TrainingSet
from bench.scenario.drawings import drawings, images
from bench.testbed.split import TEMPLATES
from fastguard import testbed

PRESERVED = 20  # things


def items() -> list[Item]:
    """Twenty captions, then a hundred ordinary prompts, of things that the fine-tune does not show."""
    tuned = []
    for place, one in enumerate(drawings()):
        prompt = testbed.Prompt(one.prompt, one.concept, "fine-tuned", "test", 1, place)
        tuned.append(Item("memorized", one.prompt, one.prompt, "fine-tuned", (place,), prompt))
    return [*tuned, *(item for item in inputs.embedded() if item.group == "ordinary")]


def training() -> TrainingSet:
    """The twenty pictures."""
    tiles = images()
    return TrainingSet(list(tiles), Image.fromarray, hashlib.sha256(tiles.tobytes()).hexdigest())


def preserved() -> list[str]:
    """Captions of which the fine-tune sees the model's own pictures: half of those of the first twenty tuning things."""
    return _captions(slice(PRESERVED))[::2]


def calibration() -> list[str]:
    """Ordinary prompts for the gate, of the other tuning things, in every template."""
    return _captions(slice(PRESERVED, None))


def _captions(part: slice) -> list[str]:
    """Of the ordinary tuning things that the fine-tune does not show."""
    shown = {one.concept for one in drawings()}
    known = [prompt.concept for prompt in testbed.prompts("ordinary", "tuning") if prompt.concept not in shown]
    return [template.format(x=concept) for concept in known[part] for template in TEMPLATES]
