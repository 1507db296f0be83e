"""What guidance when: the policy of each image, and its file format.

Per image and denoiser row k, with u, c the outputs of the unconditional and the conditional branch, the guided output is

    e = u + g (c - u),    g = `before` until the transition, `guidance_scale` from it on

(Jain et al., "Classifier-Free Guidance inside the Attraction Basin May Cause Memorization", CVPR 2025, arXiv 2411.16738). The
transition is static (a timestep) or dynamic (decided per image from the curve d_k = ||c - u||^2). `plan.lower` turns policies into
the numbers that the kernel reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from fastguard import checks
from fastguard.files import read_json, short, write_json
from fastguard.policies.fields import checked, common_length

T = TypeVar("T")
PerSample: TypeAlias = "T | list[T]"  # a list holds one value per image of the batch
Number = float | int

FORMAT = 1  # version of the policy file
UNGATED_COST = " (on the embedded model 79.8% of 400 ordinary images still showed their caption, unguarded 84.8%)"
PER_IMAGE = "per_image"  # in a provenance: a list of one per image
SUFFIX = ".json"  # by which a policy file is told from a preset's name


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When the guard guides, and how strongly. Any field may be a list as long as the batch: one value per image.

    before          g before the transition: "zero" 0, "conditional" 1, "opposite" -s with s the guidance scale at that row, or a number
    transition      None: plain guidance throughout. "static": at the first step with t <= t_star. "dynamic": when `rule` fires
    t_star          timestep >= 0; for "static" only, and needed there
    rule            dynamic only. "minimum": at row k if d[k-1] is a strict local minimum of the observations (the paper's rule).
                    "drop": once the statistic is below rho times its own maximum so far
    rho             threshold of "drop", in (0, 1)
    magnitude       statistic of the rule: d of the model's "output", or d converted to "epsilon" or "x0" space
    deadline        timestep >= 0 at which a dynamic rule that has not fired is overruled (the report says `forced`); None: never
    gate            tau > 0. Only images with RMS(c - u) = sqrt(d / elements) >= tau in one of the first `gate_steps` observations are
                    guarded; the others get plain guidance from the first row to the last. None: every image is guarded
    min_step        dynamic: minima (drops) before this observation are ignored
    min_drop        in [0, 1). "minimum" counts only if it lies below (1 - min_drop) times the maximum so far
    opposite_steps  opposite guidance (`before` = "opposite" or a negative number) holds for at most this many first rows, zero
                    guidance after them until the transition; None: no limit
    monitor         run both branches also where the guidance needs only one, so that the report's curve has no holes; an
                    anchored policy does anyway
    anchored        take out of the guidance what leads to the picture that the model's own first prediction shows (kernels/anchor.py), with or
                    without a transition, which sets the scale. Both branches run at every row
    suspect         bound on d at mid-run over d at the first row: an image below it, if it got plain guidance, is `suspect` in the report; None: no verdict
    guidance_scale  None: the pipeline's own. A number, or a tuple with one value per denoiser row
    name            shown in reports; at most 200 characters
    provenance      how gate and suspect were found, and what they belong to (model, scheduler, steps, dtype): JSON values, no part
                    of a comparison

    `RANGES` has the limits of the numbers. A value that is not allowed, or that would have no effect (a deadline without a dynamic
    transition, ...), raises ValueError with the argument's name, the value and what is allowed.
    """

    before: PerSample[str | Number] = "zero"
    transition: PerSample[str | None] = None
    t_star: PerSample[Number | None] = None
    rule: PerSample[str] = "minimum"
    rho: PerSample[Number] = 0.3
    magnitude: PerSample[str] = "output"
    deadline: PerSample[Number | None] = None
    gate: PerSample[Number | None] = None
    gate_steps: PerSample[int] = 1
    min_step: PerSample[int] = 0
    min_drop: PerSample[Number] = 0.0
    opposite_steps: PerSample[int | None] = None
    monitor: PerSample[bool] = False
    anchored: PerSample[bool] = False
    suspect: PerSample[Number | None] = None
    guidance_scale: PerSample[Number | tuple[Number, ...] | None] = None
    name: PerSample[str] = "custom"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        values = self._values()
        length = common_length(values)
        each = [checked(_pick(values, i), "" if length is None else f"sample {i}: ") for i in range(length or 1)]
        for key, value in values.items():
            object.__setattr__(self, key, [one[key] for one in each] if isinstance(value, list) else each[0][key])

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in FIELDS}

    @property
    def images(self) -> int | None:
        """How many images the per-image lists are for; None if there are none."""
        return common_length(self._values())

    @property
    def guarded(self) -> bool:
        """True if some image may get other than plain guidance."""
        return any(kind is not None for kind in _as_list(self.transition)) or any(_as_list(self.anchored))

    @property
    def hash(self) -> str:
        """Of what the policy does, in 16 hexadecimal digits: fields that have their defaults, the name and the provenance leave it alone."""
        values = self._values().items()
        told = {key: _encode(value) for key, value in values if key != "name" and value != getattr(Policy, key)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def sets_scale(self) -> bool:
        """True if some image has a guidance scale of its own."""
        return any(scale is not None for scale in _as_list(self.guidance_scale))

    def ungated_warning(self) -> str | None:
        """What to tell the user once on enabling this policy: None unless images are guarded whatever their prompt."""
        ungated = [s for s in self.samples(self.images or 1) if s.guarded and s.gate is None]
        if not ungated:
            return None
        names = ", ".join(map(short, dict.fromkeys(s.name for s in ungated)))
        cost = UNGATED_COST if all(s.anchored for s in ungated) else ""
        return (
            f"policy {names} has no gate: every prompt is guarded, ordinary ones too, and their images change{cost}."
            " Set gate=tau (`fastguard calibrate` chooses it from ordinary prompts), or use policy 'cfg' for plain guidance."
        )

    def samples(self, batch: int) -> list[Policy]:
        """One policy with scalar fields (a per-step tuple counts as one) for each of `batch` images; ValueError if a list has another length."""
        if self.images is None:
            return [self] * batch
        if self.images != batch:
            lists = f"per-image lists of {self.images} values, but the batch has {batch} images"
            raise ValueError(f"policy {self.name!r} has {lists}; values per denoiser row are a tuple")
        notes = self.provenance.get(PER_IMAGE)
        each = notes if isinstance(notes, list) and len(notes) == batch else [self.provenance] * batch
        return [Policy(**_pick(self._values(), i), provenance=each[i]) for i in range(batch)]

    @classmethod
    def stack(cls, policies: Sequence[Policy]) -> Policy:
        """One policy for a batch, image b under policies[b]. ValueError if there are none or one holds per-image lists already.

        Its provenance is the one that they have in common, or {"per_image": [...]}.
        """
        if not policies:
            raise ValueError("policies=[]: must hold at least one policy")
        for b, one in enumerate(policies):
            if one.images is not None:
                held = f"already holds per-image lists of {one.images} values"
                raise ValueError(f"policies[{b}] {held}: must be for one image")
        notes = [one.provenance for one in policies]
        known = notes[0] if all(note == notes[0] for note in notes) else {PER_IMAGE: notes}
        return cls(**{key: [getattr(one, key) for one in policies] for key in FIELDS}, provenance=known)

    def to_dict(self) -> dict[str, Any]:
        """All fields, without the provenance, as JSON values: a list is per image, {"per_step": [...]} is per denoiser row."""
        return {"fastguard_policy": FORMAT} | {key: _encode(value) for key, value in self._values().items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        """Inverse of `to_dict`. Missing fields take their defaults; unknown ones raise ValueError."""
        version = values.get("fastguard_policy") if isinstance(values, Mapping) else None
        if version != FORMAT or version is True:
            raise ValueError(f'not a fastguard policy: expected an object with "fastguard_policy": {FORMAT}')
        given = {key: value for key, value in values.items() if key not in ("fastguard_policy", "provenance")}
        refuse_unknown(given)
        note = values.get("provenance") or {}
        if not isinstance(note, dict):
            raise ValueError(f"provenance={short(note)}: must be an object")
        fields: dict[str, Any] = {
            key: [_decode(key, item) for item in value] if isinstance(value, list) else _decode(key, value)
            for key, value in given.items()
        }
        return cls(**fields, provenance=note)

    def save(self, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None) -> Path:
        """Write the policy as JSON, atomically, with its provenance or the one given here.

        ValueError for a path that `policy` would not take for a file's.
        """
        if not os.fspath(path).endswith(SUFFIX):
            raise ValueError(f"path={short(os.fspath(path))}: must end in {SUFFIX}")
        note = dict(self.provenance if provenance is None else provenance)
        return write_json(path, self.to_dict() | ({"provenance": note} if note else {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file. FileNotFoundError if there is none; ValueError, naming the file and the field, if it is not valid."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None


FIELDS = tuple(field.name for field in dataclasses.fields(Policy) if field.name != "provenance")


def refuse_unknown(given: Mapping[str, Any]) -> None:
    for key in given:
        if key not in FIELDS:
            allowed = f"allowed are {', '.join(FIELDS)}{checks.meant(key, FIELDS)}"
            raise ValueError(f"unknown policy field {short(key)}: {allowed}")


def _pick(values: Mapping[str, Any], index: int) -> dict[str, Any]:
    return {key: value[index] if isinstance(value, list) else value for key, value in values.items()}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"per_step": list(value)}
    return [_encode(item) for item in value] if isinstance(value, list) else value


def _decode(key: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) != {"per_step"} or not isinstance(value["per_step"], list):
        raise ValueError(f'{key}={short(value)}: an object must be {{"per_step": [...]}}')
    return tuple(value["per_step"])
