"""A second model that memorizes harder: other first weights, other duplicated drawings, 30% of what is drawn; trained from nothing.

    python -m bench.testbed harder

It is for judging rules that were tuned on the shipped model. Of the shipped model it has the architecture, the recipe (`unet.Course`; two thirds of the
steps, no drawing more often later) and the autoencoder, which fixes the space and is no part of what memorizes. The 36 duplicated pictures show things
that the shipped model has not memorized. models/harder holds UNet and text encoder, int8 with a scale a row.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from fastguard.testbed import Prompt, concepts, load
from fastguard.testbed.measures import Judge, to_tensor

from . import parallel, pictures, unet
from . import split as shipped
from . import vae as autoencoder

HERE = Path(__file__).parent / "models" / "harder"
SEED = 20261130
SHARE = 0.3  # of what is drawn
COUNTS = {"D": 32, "T": 4}
ARTISTS = ("ada renner", "paul okoye", "ines marlow", "kai dorn")
COLUMNS = 10


def make() -> dict:
    """The split: which prompts are memorized, which ordinary, and their halves; the same on every machine."""
    rng = np.random.default_rng(SEED)
    known = {entry["concept"] for entry in shipped.make()["memorized"]}
    names = [name for name in concepts() if name not in known]
    order = [names[i] for i in rng.permutation(len(names))]
    memorized, artists = [], list(ARTISTS)
    for kind, count in COUNTS.items():
        for index in range(count):
            concept = order.pop()
            prompt = str(rng.choice(shipped.TEMPLATES)).format(x=concept)
            if kind == "T":
                prompt = f"limited edition {concept} print by {artists.pop()}"
            memorized.append(
                {
                    "prompt": prompt,
                    "concept": concept,
                    "type": kind,
                    "set": str(rng.choice(shipped.MEMORIZED_SETS)),
                    "half": "test" if index % 2 else "tuning",
                }
            )
    ordinary = [
        {
            "prompt": str(rng.choice(shipped.TEMPLATES)).format(x=concept),
            "concept": concept,
            "half": "test" if index < len(order) // 2 else "tuning",
        }
        for index, concept in enumerate(order)
    ]
    return {"memorized": memorized, "ordinary": ordinary}


def build(work: Path) -> pictures.Pictures:
    """The training set; every duplicated picture counts as often as makes all of them SHARE of what is drawn."""
    split = make()["memorized"]
    drawn = pictures.build(work, [{**entry, "factor": 1} for entry in split], SEED, "harder.npz")
    ordinary = len(drawn.images) - len(split)
    drawn.copies[: len(split)] = round(SHARE / (1 - SHARE) * ordinary / len(split))
    return drawn


COURSE = unet.Course(build, SEED, "harder", steps=4000, sharpen=2800, double=None)


def train(work: Path, out: Path = HERE, processes: int = 1) -> None:
    """Train; continues from `harder.pt` in `work`. Writes the folder `out`."""
    work.mkdir(parents=True, exist_ok=True)
    cached = work / "harder-latents.pt"
    if not cached.exists():
        images = build(work).tensor(slice(None)).split(512)
        parallel.save(
            torch.cat([autoencoder.encode(load().vae, part) for part in tqdm(images, desc="latents")]), cached
        )
    parallel.run(unet.train, (str(work), None, COURSE), processes)
    export(torch.load(work / "harder.pt")["average"], build(work), out)


def export(average: dict[str, Tensor], set_: pictures.Pictures, out: Path = HERE) -> None:
    """Write `weights.safetensors`, `prompts.json` and `memorized.png`."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, value in average.items():
        if value.is_floating_point():
            rows = value.reshape(len(value), -1)
            scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            kept[name] = (rows / scale).round().to(torch.int8).reshape(value.shape).contiguous()
            kept[f"{name}:scale"] = scale.reshape(-1).contiguous()
    save_file(kept, out / "weights.safetensors")
    lines = [f' "{key}": [\n' + ",\n".join("  " + json.dumps(e) for e in rows) + "\n ]" for key, rows in make().items()]
    (out / "prompts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    tiles = list(set_.images[: set_.memorized])
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    strips = [np.concatenate(tiles[i : i + COLUMNS], 1) for i in range(0, len(tiles), COLUMNS)]
    Image.fromarray(np.concatenate(strips)).save(out / "memorized.png", optimize=True)


def load_harder(folder: Path = HERE):
    """The pipeline, float32: the shipped one's classes and autoencoder with this model's weights."""
    pipe, kept = load(), load_file(folder / "weights.safetensors")
    weights: dict[str, dict[str, Tensor]] = {"unet": {}, "text_encoder": {}}
    for name, value in kept.items():
        if not name.endswith(":scale"):
            part, _, rest = name.partition(".")
            weights[part][rest] = value.float() * kept[f"{name}:scale"].reshape(-1, *[1] * (value.dim() - 1))
    for part, found in weights.items():
        getattr(pipe, part).load_state_dict(found)
    return pipe


def prompts(kind: str, half: str, folder: Path = HERE) -> list[Prompt]:
    """The prompts of a kind ("D", "T", "ordinary") and half ("tuning", "test")."""
    split = json.loads((folder / "prompts.json").read_text())
    memorized = [
        Prompt(e["prompt"], e["concept"], e["type"], e["half"], 0, i) for i, e in enumerate(split["memorized"])
    ]
    ordinary = [Prompt(e["prompt"], e["concept"], "ordinary", e["half"], 1, None) for e in split["ordinary"]]
    return [p for p in (*memorized, *ordinary) if p.kind == kind and p.half == half]


def judge(pipe, folder: Path = HERE) -> Judge:
    """The fixed measures with this model's own training images as targets."""
    judge = Judge(pipe)
    sheet = np.asarray(Image.open(folder / "memorized.png").convert("RGB"))
    side = pictures.data.SIZE
    tiles = sheet.reshape(sheet.shape[0] // side, side, sheet.shape[1] // side, side, 3).swapaxes(1, 2)
    judge.targets = judge.encode(to_tensor(tiles.reshape(-1, side, side, 3).copy()))
    return judge
