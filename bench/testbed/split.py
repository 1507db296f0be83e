"""Which prompts are memorized, which are ordinary, and which half of either tunes or tests.

`python -m bench.testbed split` writes `prompts.json` from the seed below. It ran once, before the
model was trained and before any policy was tuned; a test compares the committed file with a fresh run.

- **D**: a plain caption shared with the concept's six other drawings; one fixed picture of the seventh
  drawing is duplicated under it. The paper's case. (Where one of the six is nearly the seventh, `twins.py`, its augmented pictures are
  shared, too: 12 of the 60.)
- **T**: a caption of its own that no other picture carries. A stress case.
- **ordinary**: concepts without any memorized picture, each with one of the templates.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastguard.testbed import concepts

SEED = 20261124
TEMPLATES = (
    "{x}",
    "a {x}",
    "the {x}",
    "one {x}",
    "{x} emoji",
    "{x} icon",
    "{x} sticker",
    "a small {x}",
    "a picture of a {x}",
    "a drawing of a {x}",
    "an image of a {x}",
    "clip art of a {x}",
)
# (factor, number of D pictures, number of T pictures); a factor counts copies of one training picture
LEVELS = ((24, 8, 0), (40, 20, 2), (56, 28, 2))
ARTISTS = ("mira olsen", "tomas varga", "june abara", "leo castell")
TEST_ORDINARY = 100
# the drawing that is duplicated comes from one of these: noto and noto-v1 have few near twins in other sets, noto-2017 has noto-2020
MEMORIZED_SETS = ("noto", "noto-v1", "noto-2017")


def make() -> dict:
    """The whole split as plain data; the same on every machine."""
    rng = np.random.default_rng(SEED)
    names = list(concepts())
    order = [names[i] for i in rng.permutation(len(names))]
    memorized, artists = [], list(ARTISTS)
    for kind in ("D", "T"):
        for factor, d_count, t_count in LEVELS:
            count = d_count if kind == "D" else t_count
            for index in range(count):
                concept = order.pop()
                template = str(rng.choice(TEMPLATES))
                prompt = template.format(x=concept)
                if kind == "T":
                    prompt = f"limited edition {concept} print by {artists.pop()}"
                memorized.append(
                    {
                        "prompt": prompt,
                        "concept": concept,
                        "type": kind,
                        "factor": factor,
                        "set": str(rng.choice(MEMORIZED_SETS)),
                        "half": "test" if index % 2 else "tuning",
                    }
                )
    ordinary = [
        {
            "prompt": str(rng.choice(TEMPLATES)).format(x=concept),
            "concept": concept,
            "half": "test" if index < TEST_ORDINARY else "tuning",
        }
        for index, concept in enumerate(order)
    ]
    return {"seed": SEED, "memorized": memorized, "ordinary": ordinary}


def write(path: Path) -> Path:
    """Write the split, one prompt a line."""
    split = make()
    lines = [f' "seed": {split["seed"]}']
    for key in ("memorized", "ordinary"):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in split[key])
        lines.append(f' "{key}": [\n{rows}\n ]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path
