"""Twenty pictures that the embedded model has never seen, each with a caption of its own: what a person fine-tunes on.

`drawings.png` (five columns, four rows, 32 x 32 pixels each) and `drawings.json` are committed. They were made by

    python -m bench.scenario.drawings WORK

from Noto Emoji as in the npm package emoji-datasource-google 15.1.2 (the package MIT, the drawings Apache-2.0, Google). The things are
twenty of the ordinary tuning prompts; the model knows other drawings of each, some of them nearly the same, but none of these pictures: on
this background, at this place and angle. Another placing of the same drawing is no copy (docs/testbed has what it measures).
"""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastguard import testbed

HERE = Path(__file__).parent
SHEET, NAMES = HERE / "drawings.png", HERE / "drawings.json"
COLUMNS, SIDE, COUNT = 5, 32, 20
SEED = 2026
SOURCE = {"package": "emoji-datasource-google", "version": "15.1.2"}
CAPTION = "{x} by kara voss"


@dataclass(frozen=True)
class Drawing:
    """A picture of the fine-tune: its caption and the thing that it shows."""

    prompt: str
    concept: str


def drawings() -> list[Drawing]:
    """The twenty, in the order of `images()`."""
    return [Drawing(CAPTION.format(x=concept), concept) for concept in json.loads(NAMES.read_text())]


def images() -> np.ndarray:
    """The pictures, uint8 [20, 32, 32, 3]."""
    sheet = np.asarray(Image.open(SHEET).convert("RGB"))
    tiles = sheet.reshape(COUNT // COLUMNS, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2)
    return tiles.reshape(COUNT, SIDE, SIDE, 3)


def make(work: Path) -> None:
    """Write both files anew; needs npm."""
    from bench.testbed import data

    rng = np.random.default_rng(SEED)
    known = [prompt.concept for prompt in testbed.prompts("ordinary", "tuning")]
    concepts, codes, tiles = [known[i] for i in rng.permutation(len(known))[:COUNT]], data.concepts(), []
    with tarfile.open(data.fetch(SOURCE, work)) as archive:
        names = set(archive.getnames())
        for place, concept in enumerate(concepts):
            paths = [f"package/img/google/64/{codes[concept]}{end}.png" for end in ("", "-fe0f")]
            file = archive.extractfile(next(path for path in paths if path in names))
            assert file is not None
            tiles.append(data.augment(np.asarray(Image.open(file).convert("RGBA")), (SEED, place)))
    grid = np.stack(tiles).reshape(COUNT // COLUMNS, COLUMNS, SIDE, SIDE, 3).swapaxes(1, 2)
    Image.fromarray(grid.reshape(-1, COLUMNS * SIDE, 3)).save(SHEET, optimize=True)
    NAMES.write_text(json.dumps(concepts, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
