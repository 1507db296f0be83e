"""One image to make: the fields of a prompt file, checked. Every error names the field, its value and what is allowed."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard import checks
from fastguard.batch.options import JobOptions
from fastguard.files import is_unicode, short
from fastguard.policies.fields import MOST_STEPS, RANGES
from fastguard.policies.gate import screening_bound
from fastguard.policies.policy import Policy
from fastguard.policies.presets import PRESETS
from fastguard.policies.presets import policy as make_policy

FIELDS = (
    "id", "prompt", "negative_prompt", "seed", "steps", "guidance_scale", "policy", "width", "height",
)  # fmt: skip
LONGEST_ID = 200  # characters; a file name with its ending has to fit 255 bytes
LONGEST_TEXT = 5000  # characters; no text encoder reads more, and a JPEG's metadata has to hold it
LARGEST_SIDE = 16376  # pixels; WebP holds no more than 16383, and models make multiples of 8
SEEDS = 2**32
"""Seeds that differ: torch's generator on the CPU, which makes the noise, reads the lower 32 bits of a seed and no more."""
_ID = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{LONGEST_ID - 1}}}")
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # never files on Windows
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

# Made and checked once, and not for each of a million rows.
_replaced = functools.lru_cache(maxsize=4096)(dataclasses.replace)
_policy_values = functools.lru_cache(maxsize=4096)(Policy.to_dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image. `policy` holds the row's guidance scale, if it has one, and is for this image alone.

    guidance_scale, negative_prompt, width, height: None is the pipeline's own.
    screen: noises and bound of the mean over them, if the prompt is to be screened and the policy without its gate is for a flagged one.
    remake_of: the id of the suspect image in whose place this one is made.
    line: of the prompt file, from 1 (a row of a parquet file or a list); no part of what the image is.
    """

    id: str
    prompt: str
    policy: Policy
    negative_prompt: str | None = None
    seed: int = 0
    steps: int = 50
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    screen: tuple[int, float] | None = None
    remake_of: str | None = None
    line: int | None = None

    @property
    def guided(self) -> bool:
        """Whether the pipeline runs its unconditional branch: as in diffusers, not at a guidance scale of 1 and below."""
        return self.guidance_scale is None or self.guidance_scale > 1

    @property
    def stock_scale(self) -> float | None:
        """The scale of a call without the guard; None is the pipeline's own."""
        own: Any = self.policy.guidance_scale
        return self.guidance_scale if self.guidance_scale is not None or isinstance(own, tuple) else own

    def identity(self) -> dict[str, Any]:
        """All that decides what the image looks like, apart from the model: two requests with the same id must agree in it."""
        left_out = {"id", "line", "remake_of"} | ({"screen"} if self.screen is None else set())
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        return values | {"policy": _policy_values(self.policy)}

    def digest(self, settings: Mapping[str, Any]) -> str:
        """A short name of the identity under the model's `settings`; written into every image."""
        text = json.dumps([self.identity(), dict(settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def remade(request: Request) -> Request:
    """The image to make in the place of a suspect one: anchored, whatever the gate and the screening say, under an id of its own."""
    policy = ungated(request.policy)
    if not policy.anchored:
        policy = dataclasses.replace(PRESETS["anchored"], suspect=policy.suspect, guidance_scale=policy.guidance_scale)
    return dataclasses.replace(request, id=f"{request.id}-remake", remake_of=request.id, policy=policy, screen=None)


def ungated(policy: Policy) -> Policy:
    """The policy for an image of which it is known that it is to be guarded."""
    return dataclasses.replace(policy, gate=None, gate_steps=1)


def parse(
    row: Mapping[str, Any], options: JobOptions, index: int, *, line: int | None = None, base: Path = Path()
) -> list[Request]:
    """The `options.images_per_prompt` images of one row: image n takes seed + n. ValueError if a field is unknown or a value is not allowed.

    row      field -> value; None and missing take the option of the same name. Text is taken for a number where a number is needed.
    options  with a Policy; their gate is for every row's policy that guards and has none of its own, too
    index    position of the row, from 0: a row without id is called by it and its seed, e.g. 00003-0
    base     directory from which paths of policy files are resolved
    """
    for key in row:
        if key not in FIELDS:
            told = f"unknown field {short(key)}: allowed are {', '.join(FIELDS)}{checks.meant(key, FIELDS)}"
            raise ValueError(told)
    given = {key: plain for key, value in row.items() if (plain := _plain(value)) is not None}
    values = {name: getattr(options, name, None) for name in FIELDS} | given
    first = checks.integer("seed", _numeric(values["seed"]), 0, SEEDS - options.images_per_prompt)
    given_sides = [name for name in ("width", "height") if values[name] is not None]
    sides: Any = {name: checks.integer(name, _numeric(values[name]), 8, LARGEST_SIDE) for name in given_sides}
    negative = values["negative_prompt"]
    chosen, scale = _policy_and_scale(given, options, base)
    shared = Request(
        id="0",
        prompt=_text("prompt", values["prompt"], empty=False),
        policy=chosen,
        negative_prompt=None if negative is None else _text("negative_prompt", negative),
        steps=checks.integer("steps", _numeric(values["steps"]), 1, MOST_STEPS),
        guidance_scale=scale,
        screen=screening_bound(chosen) if options.screen and chosen.guarded else None,
        line=line,
        **sides,
    )
    name = _id(given["id"]) if "id" in given else f"{index:05d}"
    numbered = "id" not in given or options.images_per_prompt > 1
    return [
        dataclasses.replace(shared, id=_id(f"{name}-{seed}") if numbered else name, seed=seed)
        for seed in range(first, first + options.images_per_prompt)
    ]


def _policy_and_scale(given: Mapping[str, Any], options: JobOptions, base: Path) -> tuple[Policy, float | None]:
    chosen = _policy(given["policy"], options.gate, base) if "policy" in given else options.policy
    if chosen.images is not None:
        raise ValueError(f"policy {short(chosen.name)} holds per-image lists: must be for one image")
    sets_its_own = "policy" in given and chosen.guidance_scale is not None
    scale = given.get("guidance_scale", None if sets_its_own else options.guidance_scale)
    if scale is None:
        return chosen, None
    lowest, highest = RANGES["guidance_scale"]
    allowed = f"a number from {lowest:g} to {highest:g}"
    scale = checks.number("guidance_scale", _numeric(scale), allowed, lambda x: lowest <= x <= highest)
    if chosen.guidance_scale is not None:
        raise ValueError(f"guidance_scale={scale:g}: policy {short(chosen.name)} sets its own; give one of the two")
    if scale > 1:
        return _replaced(chosen, guidance_scale=scale), scale
    if chosen.guarded:
        raise ValueError(
            f"guidance_scale={scale:g}: must be above 1 under policy {short(chosen.name)}"
            " (at or below 1 pipelines run no unconditional branch, so there is nothing to guard)"
        )
    return chosen, scale


def _policy(value: Any, gate: float | None, base: Path) -> Policy:
    if isinstance(value, str):
        value = named_policy(_text("policy", value), base)
    elif isinstance(value, Mapping):
        value = Policy.from_dict(value)
    elif not isinstance(value, Policy):
        raise ValueError(f"policy={short(value)}: must be a preset, a path ending in .json, or a policy")
    return _replaced(value, gate=gate) if gate is not None and value.guarded and value.gate is None else value


@functools.lru_cache(maxsize=1024)
def named_policy(name: str, base: Path) -> Policy:
    try:
        return make_policy(os.fspath(base / name) if name.endswith(".json") else name)
    except OSError as error:
        raise ValueError(f"policy={short(name)}: {error.strerror}") from None


def _text(name: str, value: Any, *, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}={short(value)}: must be text")
    if not is_unicode(value):
        raise ValueError(f"{name}={short(value)}: is not UTF-8 text")
    if found := _CONTROL.search(value):
        raise ValueError(f"{name}={short(value)}: must not hold the control character {found[0]!r}")
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"{name} has {len(value)} characters: at most {LONGEST_TEXT} are allowed")
    if not empty and not value.strip():
        raise ValueError(f"{name}={short(value)}: must be text that is not empty")
    return value.strip()


def _id(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 3 * LONGEST_ID
    name = str(value) if whole else value
    if isinstance(name, str) and _ID.fullmatch(name) and not _DEVICES.fullmatch(name):
        return name
    raise ValueError(
        f"id={short(value)}: must be 1 to {LONGEST_ID} letters, digits, '_', '-' and '.', beginning with a letter, a digit or '_',"
        " and not be the name of a device"
    )


def _plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def _numeric(value: Any) -> Any:
    """The number that a text of a table is, if it is one, and the integer that a float is: tables write a column with gaps as 7.0."""
    if isinstance(value, str) and value.isascii() and "_" not in value:
        with suppress(ValueError):
            number = float(value)
            value = number if math.isfinite(number) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value
