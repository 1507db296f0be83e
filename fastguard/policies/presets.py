"""Policies by name, and `policy`, which takes whatever names one."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from fastguard import checks
from fastguard.files import short
from fastguard.policies.policy import SUFFIX, Policy, refuse_unknown

DEFAULT = "anchored"
"""The preset of whoever names none. On the embedded model without a gate it leaves 0% copies, `dtp` 31%, `og+dtp` 2%; of the ordinary pictures 80%
still show their caption, under `dtp` 64%, under `og+dtp` 2% (docs/testbed). It needs a scheduler that says what x0 is: others are refused."""

BLIND = "dtp"
"""The same for a front that need not know the scheduler."""

DEADLINE = 600.0
"""Timestep at which `dtp` and `og+dtp` begin to guide even if no local minimum was seen: the middle of the fixed timesteps that work
in the paper (500 to 700). On the embedded model's tuning prompts, copies and faithfulness of the others: at 700 43% and 63%, at 561
32% and 53%, without a deadline 23% and 28% (docs/testbed/tuning.json, which calls 561 600)."""

_FIELDS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "stp": {"transition": "static", "t_star": 500.0},
    "og+stp": {"before": -2.0, "transition": "static", "t_star": 650.0},
    "dtp": {"transition": "dynamic", "deadline": DEADLINE},
    "og+dtp": {"before": "opposite", "transition": "dynamic", "deadline": DEADLINE},
    "paper-dtp": {"transition": "dynamic"},
    "paper-og+dtp": {"before": "opposite", "transition": "dynamic"},
    "released-dtp": {"before": "conditional", "transition": "dynamic"},
    "anchored": {"anchored": True},
}

PRESETS = {name: Policy(name=name, **fields) for name, fields in _FIELDS.items()}
"""`cfg` plain guidance; the paper's methods (`stp`, `dtp`, with opposite guidance `og+`); `paper-` without
the deadline; `released-dtp` what the authors' released script really runs (g = 1 before the transition); `anchored` our own, from the model's first
prediction, without a transition."""

Source: TypeAlias = str | os.PathLike[str] | Policy


def policy(source: Source | Sequence[Source], **overrides: Any) -> Policy:
    """The policy `source` (a preset's name, a file ending in .json, or a policy) with the fields in `overrides` replaced.

    A list of such sources gives one policy for as many images, image b under source[b].

    ValueError for an unknown preset or field or a value that is not allowed, FileNotFoundError for a missing file.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        for name, value in overrides.items():
            if isinstance(value, list):
                allowed = "must be one value where policy is a list; set it in each of the policies"
                raise ValueError(f"{name}={value!r}: {allowed}")
        return Policy.stack([policy(one, **overrides) for one in source])
    if isinstance(source, Policy):
        base = source
    elif isinstance(source, (str, os.PathLike)) and os.fspath(source).endswith(SUFFIX):
        base = Policy.load(source)
    elif isinstance(source, str) and source in PRESETS:
        base = PRESETS[source]
    else:
        raise ValueError(
            f"policy={short(source)}: allowed are {', '.join(PRESETS)}, a Policy, a path ending in {SUFFIX}, or a list of them"
            + checks.meant(source, PRESETS)
        )
    refuse_unknown(overrides)
    if "gate" in overrides or "suspect" in overrides:  # what is known of the base's belongs to those
        overrides["provenance"] = {}
    return dataclasses.replace(base, **overrides)
