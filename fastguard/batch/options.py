# ruff: noqa: RUF009  (a call per field: what it gives is a field, and not shared)
"""All options of `generate`, once: keyword arguments of Python, the command line and docs/generate.md are made of this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastguard import checks

FORMATS = ("png", "jpeg", "webp")
METADATA = ("full", "id", "none")
MOST_ACTORS = 10_000
SMALLEST = 0.0001  # amount of a resource, Ray counts in it


def _option(default: Any, text: str, allowed: Any = None) -> Any:
    """allowed: names, or the lowest and the highest integer; None: checked where it is used."""
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed})


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Checked on construction: ValueError for a value that is not allowed, and for one that would have no effect."""

    policy: Any = _option(None, "Preset, or path of a policy file; anchored unless given, and for testbed its own.")
    gate: float | None = _option(None, "Guard only images whose RMS(c - u) reaches this at the first steps.")
    negative_prompt: str | None = _option(None, "What the images shall not show.")
    seed: int = _option(0, "Image n of a prompt is made from seed + n.")
    steps: int = _option(50, "Denoising steps.")
    guidance_scale: float | None = _option(
        None, "Guidance scale; unless given the pipeline's default, and for testbed 3."
    )
    width: int | None = _option(None, "Pixels; the model's own size unless given.")
    height: int | None = _option(None, "Pixels; the model's own size unless given.")
    images_per_prompt: int = _option(1, "Images per prompt.", (1, 100_000))
    batch_size: int = _option(8, "Images per call of the pipeline; generate halves it if memory is short.", (1, None))
    format: str = _option("png", "png, jpeg or webp.", FORMATS)
    quality: int | None = _option(None, "Of jpeg and webp, 1 to 100; 95 unless given.", (1, 100))
    metadata: str = _option("full", "What an image file says of itself: full, its id alone, or none.", METADATA)
    shard_size: int | None = _option(
        None, "Write WebDataset shards of so many images instead of a file per image.", (1, None)
    )
    screen: bool = _option(
        False,
        "Guard the images of prompts whose mean over a few noises says that they are memorized, in place of the gate.",
    )
    remake: bool = _option(
        False, "Make suspect images again, anchored and without a gate, beside the first ones: ID-remake."
    )
    sheet: bool = _option(False, "Also write sheet.png, a contact sheet of the images.")
    keep_going: bool = _option(False, "Leave out what is bad or fails, and list it in rejected.jsonl.")
    dtype: str = _option(
        "auto",
        "float32, float16 or bfloat16; auto: float16 on a GPU, else float32.",
        ("auto", "float32", "float16", "bfloat16"),
    )
    device: str = _option("auto", "Torch device; auto: a GPU if there is one.")
    scheduler: str | None = _option(None, "Diffusers scheduler in place of the model's own, e.g. DDIM.")
    variant: str | None = _option(None, "Of the weights' files, e.g. fp16.")
    workers: int | None = _option(None, "Threads that encode and write images.", (1, 1000))
    engine: str = _option("local", "local, or ray: several processes on one machine or many.", ("local", "ray"))
    actors: int | None = _option(None, "ray: processes with a model each; 1 unless given.", (1, MOST_ACTORS))
    cpus_per_actor: float | None = _option(None, "ray: CPUs of each; 1 unless given.")
    gpus_per_actor: float | None = _option(None, "ray: GPUs of each, a fraction shares one; 0 unless given.")
    ray_address: str | None = _option(None, "ray: address of a cluster; a local one is started unless given.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobOptions:
        """From keyword arguments. TypeError for one that is not there, with the name that may have been meant."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise TypeError(f"generate: there is no option {name!r}{checks.meant(name, names)}")
        return cls(**values)

    def __post_init__(self) -> None:
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for field in dataclasses.fields(self):
            name, value, allowed = field.name, given[field.name], field.metadata["allowed"]
            if allowed and isinstance(allowed[0], str):
                checks.choice(name, value, allowed)
            elif allowed and value is not None:
                object.__setattr__(self, name, checks.integer(name, value, *allowed))
        for name, most in (("cpus_per_actor", MOST_ACTORS), ("gpus_per_actor", 1)):
            if given[name] is not None:
                object.__setattr__(self, name, _amount(name, given[name], most))
        needs = {
            "quality": (self.format != "png", "format='jpeg' or 'webp'"),
            "workers": (self.engine == "local", "engine='local'"),
            **{n: (self.engine == "ray", "engine='ray'") for n in given if "actor" in n or n == "ray_address"},
        }
        for name, (met, need) in needs.items():
            if given[name] is not None and not met:
                raise ValueError(f"{name}={getattr(self, name)!r}: has no effect without {need}")


def _amount(name: str, value: Any, most: float) -> float:
    """Of a resource: a part up to `most`, or whole ones."""
    whole = "" if most == MOST_ACTORS else f", or a whole number to {MOST_ACTORS}"
    return checks.number(
        name,
        value,
        f"0, from {SMALLEST} to {most}{whole}",
        lambda x: x == 0 or (SMALLEST <= x <= MOST_ACTORS and (x <= most or x.is_integer())),
    )
