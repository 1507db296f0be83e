"""What a policy's numbers belong to: the model, scheduler, steps and dtype that they were calibrated with.

Elsewhere the first row lies at another noise level, or another model answers, and a gate catches other prompts than it was proven for.

Names of a model are compared by their last part, in any case: a hub id moves to another owner, a folder to another disk. A hub id and a folder of another
name are not told apart, for a folder may be called anything; the embedded model ("testbed") is itself alone. What either side does not say is not compared.
"""

from collections.abc import Mapping
from typing import Any

from fastguard.policies.policy import Policy

EMBEDDED = "testbed"


def elsewhere(policy: Policy, used: Mapping[str, Any]) -> list[str]:
    """What to tell of a policy whose gate or bound was calibrated with something else than `used`: of one per image, each once.

    used: model, scheduler (class or short name), steps, dtype; None where it is not known.
    """
    told: dict[str, None] = {}
    for one in policy.samples(policy.images or 1):
        known = {name: one.provenance.get(name) for name in ("model", "scheduler", "steps", "dtype")}
        differ = [
            f"{name} {value}, not {used[name]}"
            for name, value in known.items()
            if value and used.get(name) and not _same(name, str(value), str(used[name]))
        ]
        if differ and (one.gate is not None or one.suspect is not None):
            told[
                f"policy {one.name!r} was calibrated with {' and '.join(differ)}: its gate may catch other ordinary prompts here than it "
                "was proven for; calibrate it with what you use (`fastguard calibrate`)"
            ] = None
    return list(told)


def _same(name: str, one: str, other: str) -> bool:
    if name == "model" and EMBEDDED in (one, other):
        return one == other
    return (name == "model" and _is_hub(one) != _is_hub(other)) or _plain(one) == _plain(other)


def _is_hub(text: str) -> bool:
    return text.rstrip("/\\").count("/") == 1 and not text.startswith((".", "/", "~"))


def _plain(text: str) -> str:
    """The last part of a path, in any case, without a scheduler's ending."""
    return text.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower().removesuffix("scheduler")
