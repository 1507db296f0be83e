"""What a run was asked for, kept in settings.json: results of different settings are never mixed in one folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastguard
from bench.paper.inputs import BadInput, Item
from bench.paper.store import RESULTS
from fastguard.files import read_json, write_json

SETTINGS = "settings.json"
FORMAT = 2  # 2: units of whole prompts


def weights_hash(pipe: Any) -> str:
    """sha256 over the names, types, shapes and bytes of every parameter and buffer of the pipeline's modules."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if not isinstance(module, torch.nn.Module):
            continue
        for key, tensor in sorted(module.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{name}.{key} {data.dtype} {tuple(data.shape)}\n".encode())
            digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def configurations(pipe: Any) -> dict[str, str]:
    """sha256 of the configuration of every component that has one: the scheduler's betas, the autoencoder's scaling, ...

    Without what does not change an image: keys that begin with an underscore (paths, versions) and transformers' version.
    """
    found = {}
    for name, component in sorted(pipe.components.items()):
        if (config := getattr(component, "config", None)) is None:
            continue
        plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        kept = {key: value for key, value in plain.items() if not key.startswith("_") and key != "transformers_version"}
        found[name] = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    return found


def items_hash(items: Sequence[Item]) -> str:
    """sha256 over groups, ids, prompts and training places, in their order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.group, item.id, item.prompt, item.training)).encode())
    return digest.hexdigest()


def describe(method: Any) -> dict[str, Any]:
    """A method's parameters as JSON values: its policy for a preset, else its plain attributes."""
    if (policy := getattr(method, "policy", None)) is not None:
        return {"policy": policy.to_dict()}
    plain = (bool, int, float, str, list, tuple, type(None))
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(method).items()
        if not name.startswith("_") and isinstance(value, plain)
    }


def versions() -> dict[str, str]:
    """Of what makes the images."""
    import diffusers
    import transformers

    return {
        "fastguard": fastguard.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def keep(out: Path, settings: Mapping[str, Any], methods: Mapping[str, Any]) -> bool:
    """Write settings.json, or agree with the one that is there; True if it was. BadInput as for `check`."""
    there, known = check(out, settings, methods)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SETTINGS, {"format": FORMAT, **settings, "methods": {**known, **methods}})
    return there


def check(out: Path, settings: Mapping[str, Any], methods: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether settings.json is there, and its methods. BadInput names every setting that differs. Writes nothing.

    Methods and guidance scales may be added by later runs; a method that is there already must have the same parameters.
    """
    path = out / SETTINGS
    wanted: dict[str, Any] = {"format": FORMAT, **settings}
    known: dict[str, Any] = {}
    there = path.exists()
    if there:
        found = read_json(path)
        known = found.pop("methods", {})
        differ = [
            f"{name}: {found[name]!r} there, {wanted.get(name)!r} now"
            if name in found
            else f"{name}: missing there, so another version of the benchmark made it; {wanted[name]!r} now"
            for name in dict.fromkeys([*found, *wanted])
            if name not in found or found[name] != wanted.get(name)
        ]
        differ += [
            f"method {name}: {known[name]!r} there, {value!r} now"
            for name, value in methods.items()
            if name in known and known[name] != value
        ]
        if differ:
            raise BadInput(f"out={str(out)!r} holds results of other settings; choose another folder", differ)
    elif (out / RESULTS).exists():
        raise BadInput(f"out={str(out)!r}", [f"{RESULTS} is there without {SETTINGS}: choose another folder"])
    return there, known
