"""The units of work and the loop over them."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm import tqdm

from bench.paper.inputs import Item
from bench.paper.store import Store

if TYPE_CHECKING:
    from bench.methods import Method
    from bench.paper.measures import Measure

Made = tuple[list[dict[str, Any]], list[Image.Image]]  # rows and pictures of a unit
PLAIN, PLAIN_CURVES = "none", "cfg"  # the reference of every table; the preset under which its curves of d are kept
WATCHED = "first-look"  # looks at the first rows of many noises, for detection; in no other table


@dataclass(frozen=True)
class Unit:
    """A batch of images of one method at one guidance scale. `images`: where each is kept."""

    name: str
    method: str
    scale: float
    batch: tuple[tuple[Item, int], ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class Amount:
    """How much is made: seeds per prompt, batch size. `seeds` for the tables, `detection` for the curves of d.

    A scale given twice is kept once. ValueError for different scales with one name (six digits), which names units and folders.
    """

    scale: float
    scales: tuple[float, ...]
    seeds: int
    ordinary: int
    detection: int
    batch: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(dict.fromkeys(self.scales)))
        named: dict[str, float] = {}
        for scale in (self.scale, *self.scales):
            other = named.setdefault(f"{scale:g}", scale)
            if other != scale:
                raise ValueError(
                    f"guidance scales {other!r} and {scale!r}: are both {scale:g} in six digits; must differ there or be equal"
                )


def generator(item: Item, seed: int) -> torch.Generator:
    """The same noise for the same prompt and seed number, whatever the method: 100003 seed + crc32(id)."""
    return torch.Generator().manual_seed(100_003 * seed + zlib.crc32(item.id.encode()))


def units(items: Sequence[Item], methods: Sequence[str], amount: Amount) -> list[Unit]:
    """Everything that has to be made, in a fixed order: the tables' scale first, then the curves'.

    A unit has whole prompts, all their seeds (Wen's loss is one norm over them), unless a batch is smaller than that; it depends on
    the settings and the batch size alone, so it is made again as it was. It is named by its first image and how many it has.
    """
    groups = {g: [one for one in enumerate(items) if one[1].group == g] for g in ("memorized", "ordinary")}
    found = []
    for scale in [amount.scale, *(s for s in amount.scales if s != amount.scale)]:
        for method in methods:
            for group, members in groups.items():
                seeds = amount.seeds if group == "memorized" else amount.ordinary
                if scale != amount.scale and group == "ordinary":
                    seeds = 0
                if method == WATCHED:
                    seeds = amount.detection if scale == amount.scale else 0
                every = [(place, item, seed) for place, item in members for seed in range(seeds)]
                folder = f"images/{group}/{re.sub(r'[^A-Za-z0-9.+=-]', '_', method)}/{scale:g}"
                size = amount.batch // max(seeds, 1) * seeds or amount.batch
                for start in range(0, len(every), size):
                    part = every[start : start + size]
                    batch = tuple((item, seed) for _, item, seed in part)
                    images = tuple(f"{folder}/{place:05d}-{seed:03d}.png" for place, _, seed in part)
                    name = f"{group}/{method}/{scale:g}/{start}+{len(part)}"
                    found.append(Unit(name, method, scale, batch, images))
    return found


def ahead(work: Sequence[Unit], store: Store, rows: Callable[[str], int]) -> str:
    """What is still to make, in a line. `rows`: of the denoiser for one image of a method."""
    total = sum(len(unit.images) for unit in work)
    left = [unit.method for unit in work for _ in store.lacking(unit.images)]
    return (
        f"{len(left):,} of {total:,} images still to make, about {sum(map(rows, left)):,} rows of the denoiser at most; "
        "the bar counts images, whatever their rows"
    )


def run(work: Sequence[Unit], made: Callable[[Sequence[Unit]], Iterable[Made]], store: Store) -> None:
    """Make every unit of which the store lacks an image. `made` gives rows and pictures of units, in their order."""
    todo = [(unit, count) for unit in work if (count := len(store.lacking(unit.images)))]
    if not todo:
        return
    total, left = sum(len(unit.images) for unit in work), sum(count for _, count in todo)
    with tqdm(total=total, initial=total - left, unit="image", mininterval=2) as bar:
        bar.set_description(f"{todo[0][0].method} {todo[0][0].scale:g}")
        for (unit, count), (rows, pictures) in zip(todo, made([unit for unit, _ in todo]), strict=True):
            bar.set_description(f"{unit.method} {unit.scale:g}")
            store.add(unit.name, rows, pictures)
            bar.update(count)


def make(
    pipe: Any,
    method: Method,
    unit: Unit,
    measures: Sequence[Measure],
    decode: Callable[[torch.Tensor], list[Image.Image]],
    steps: int,
) -> Made:
    """The rows and pictures of one unit."""
    items, seeds = [item for item, _ in unit.batch], [seed for _, seed in unit.batch]
    random.seed(
        unit.name
    )  # for methods that draw from the global generators: a unit comes out the same when it is made again
    torch.manual_seed(zlib.crc32(unit.name.encode()))
    made = method(
        pipe,
        [item.prompt for item in items],
        [generator(item, seed) for item, seed in unit.batch],
        num_inference_steps=steps,
        guidance_scale=unit.scale,
    )
    pictures = decode(made.latents)
    columns: dict[str, list[Any]] = {}
    for measure in measures:
        columns.update(measure(pictures, made.latents, items))
    finite = made.latents.flatten(1).isfinite().all(1).tolist()
    rows = [
        {
            "method": unit.method,
            "scale": unit.scale,
            "group": item.group,
            "kind": item.kind,
            "id": item.id,
            "prompt": item.prompt,
            "seed": seed,
            "image": unit.images[i],
            "rows": made.rows / len(items),
            "seconds": made.seconds / len(items),
            "finite": finite[i],
            **{name: values[i] for name, values in columns.items()},
            "details": made.details[i],
        }
        for i, (item, seed) in enumerate(zip(items, seeds, strict=True))
    ]
    return rows, pictures
