"""The allow-list: the only code that knows a pipeline class.

Two kinds. `Fused`: the guard takes the combination into its own op, so it may only run where that is known to be u + s (c - u) on a
batch ordered [unconditional, conditional]. Any other `Family`: the pipeline combines, and the guard replaces the result for guarded images.
A pipeline qualifies by its `__call__`: a subclass that overrides `__call__` does not inherit its parent's place.
"""

import json
from pathlib import Path
from typing import Any

from fastguard.pipelines.families.family import Family, parts_of
from fastguard.pipelines.families.fused import Fused
from fastguard.pipelines.families.guiders import Guided

FAMILIES: tuple[Fused, ...] = Fused.read("fused.json")
OWN_FAMILIES: tuple[Family, ...] = (*Family.read("own.json"), *Guided.read("guiders.json"))
REASONS: dict[str, str] = {  # why a class is not guarded, by name
    name: reason
    for reason, names in json.loads(Path(__file__).with_name("refused.json").read_text()).items()
    for name in names
}
_NAMED: dict[str, Family] = {name: family for family in (*FAMILIES, *OWN_FAMILIES) for name in family.pipelines}
_UNKNOWN = "its guidance is not known (family='probe' takes it if it is u + g (c - u), g above 1 in every row)"


def find(pipeline_class: Any) -> Any:
    """The Family of a pipeline class, or TypeError with why it is not supported."""
    for kind in pipeline_class.__mro__:
        family = _NAMED.get(kind.__name__)
        if family is not None and kind.__module__.startswith("diffusers.") and pipeline_class.__call__ is kind.__call__:
            return family
    name = pipeline_class.__name__
    raise TypeError(f"pipe: {name} is not supported: {REASONS.get(name, _UNKNOWN)}")


__all__ = ["FAMILIES", "OWN_FAMILIES", "REASONS", "Family", "Fused", "find", "parts_of"]
