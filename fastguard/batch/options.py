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
DTYPES = ("auto", "float32", "float16", "bfloat16")
MOST_ACTORS = 10_000
SMALLEST = 0.0001  # amount of a resource, Ray counts in it
CPUS = f"0, from {SMALLEST} to {MOST_ACTORS}", lambda x: x == 0 or SMALLEST <= x <= MOST_ACTORS
GPUS = (
    f"0, from {SMALLEST} to 1, or a whole number to {MOST_ACTORS}",
    lambda x: SMALLEST <= x <= 1 or (x.is_integer() and 0 <= x <= MOST_ACTORS),
)


def _option(text: str, default: Any = None, allowed: Any = None) -> Any:
    """allowed: names; the lowest and the highest integer; what a number may be, and its test. None: checked where it is used."""
    return dataclasses.field(default=default, metadata={"help": text, "allowed": allowed})


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Checked on construction: ValueError for a value that is not allowed, and for one that would have no effect."""

    policy: Any = _option("Preset, or path of a policy file; anchored unless given, and for testbed its own.")
    gate: float | None = _option("Guard only images whose RMS(c - u) reaches this at the first steps.")
    negative_prompt: str | None = _option("What the images shall not show.")
    seed: int = _option("Image n of a prompt is made from seed + n.", 0)
    steps: int = _option("Denoising steps.", 50)
    guidance_scale: float | None = _option("Guidance scale; unless given the pipeline's default, and for testbed 3.")
    width: int | None = _option("Pixels; the model's own size unless given.")
    height: int | None = _option("Pixels; the model's own size unless given.")
    images_per_prompt: int = _option("Images per prompt.", 1, (1, 100_000))
    batch_size: int = _option("Images per call of the pipeline; generate halves it if memory is short.", 8, (1, None))
    format: str = _option("png, jpeg or webp.", "png", FORMATS)
    quality: int | None = _option("Of jpeg and webp, 1 to 100; 95 unless given.", allowed=(1, 100))
    metadata: str = _option("What an image file says of itself: full, its id alone, or none.", "full", METADATA)
    shard_size: int | None = _option(
        "Write WebDataset shards of so many images instead of a file per image.", allowed=(1, None)
    )
    screen: bool = _option(
        "Guard the images of prompts whose mean over a few noises says that they are memorized, in place of the gate.",
        False,
    )
    remake: bool = _option(
        "Make suspect images again, anchored and without a gate, beside the first ones: ID-remake.", False
    )
    sheet: bool = _option("Also write sheet.png, a contact sheet of the images.", False)
    keep_going: bool = _option("Leave out what is bad or fails, and list it in rejected.jsonl.", False)
    dtype: str = _option("float32, float16 or bfloat16; auto: float16 on a GPU, else float32.", "auto", DTYPES)
    device: str = _option("Torch device; auto: a GPU if there is one.", "auto")
    scheduler: str | None = _option("Diffusers scheduler in place of the model's own, e.g. DDIM.")
    variant: str | None = _option("Of the weights' files, e.g. fp16.")
    workers: int | None = _option("Threads that encode and write images.", allowed=(1, 1000))
    engine: str = _option("local, or ray: several processes on one machine or many.", "local", ("local", "ray"))
    actors: int | None = _option("ray: processes with a model each; 1 unless given.", allowed=(1, MOST_ACTORS))
    cpus_per_actor: float | None = _option("ray: CPUs of each; 1 unless given.", allowed=CPUS)
    gpus_per_actor: float | None = _option("ray: GPUs of each, a fraction shares one; 0 unless given.", allowed=GPUS)
    ray_address: str | None = _option("ray: address of a cluster; a local one is started unless given.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> JobOptions:
        """From keyword arguments. TypeError for one that is not there, with the name that may have been meant."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise TypeError(f"generate: there is no option {name!r}{checks.meant(name, names)}")
        return cls(**values)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, allowed = field.name, getattr(self, field.name), field.metadata["allowed"]
            if allowed and isinstance(allowed[-1], str):
                checks.choice(name, value, allowed)
            elif allowed and value is not None:
                check: Any = checks.number if callable(allowed[1]) else checks.integer
                object.__setattr__(self, name, check(name, value, *allowed))
        given = {name: value for name, value in vars(self).items() if value is not None}
        needs = {
            "quality": (self.format != "png", "format='jpeg' or 'webp'"),
            "workers": (self.engine == "local", "engine='local'"),
            **{n: (self.engine == "ray", "engine='ray'") for n in given if "actor" in n or n == "ray_address"},
        }
        for name, (met, need) in needs.items():
            if name in given and not met:
                raise ValueError(f"{name}={given[name]!r}: has no effect without {need}")
