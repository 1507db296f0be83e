"""The tables of anchored-test.json."""

from __future__ import annotations

from typing import Any

from .markdown import between, share, table


def conditions(tested: dict) -> list[str]:
    """Other schedulers, steps and scales."""
    methods = ("cfg", "anchored", "og+dtp", "dtp", "stp")
    rows = []
    for name, one in tested["conditions"].items():
        unknown: dict[str, Any] = {"copy": None, "useful": None}
        d = {method: one[method]["D, ungated"] if method in one else unknown for method in methods}
        own = one["anchored"]
        rows.append(
            [
                name,
                *(share(d[method]["copy"]) for method in methods),
                share(own["D, gated"]["copy"]),
                *(share(d[method]["useful"]) for method in ("anchored", "og+dtp", "dtp", "stp")),
                f"{d['cfg']['blown']['mean']:.1%} / {d['anchored']['blown']['mean']:.1%}",
                between(own["T, ungated"]["similarity"]["mean"]),
                f"{one['memorized caught']['mean']:.0%} / {one['ordinary caught']['mean']:.0%}",
            ]
        )
    head = [
        "D test prompts",
        *(f"copies, {'no guard' if method == 'cfg' else method}" for method in methods),
        "copies, anchored, gated",
        *(f"useful, {method}" for method in methods[1:]),
        "blown up, no guard / anchored",
        "T: similarity, anchored",
        "the gate catches: memorized / ordinary",
    ]
    return [
        "## Scheduler, steps, scale\n",
        f"Written from `anchored-test`. The first row is DDIM, 50 steps, scale 3, each other row changes one thing. No gate but in the columns that say so; the gate is {tested['gate']:g}, found with DDIM at 50 steps. "
        "Useful: no copy, faithful, not blown up.\n",
        table(head, rows),
    ]


def harder(tested: dict) -> list[str]:
    """The second model."""
    rows = [
        [
            name.replace("cfg", "no guard"),
            share(one["D"]["copy"]),
            between(one["D"]["similarity"]["mean"]),
            share(one["D"]["useful"]),
            share(one["D"]["blown"]),
            between(one["T"]["similarity"]["mean"]),
        ]
        for name, one in tested["harder"].items()
    ]
    return [
        "## A second model, which memorizes harder\n",
        "Trained from nothing: other first weights, other duplicated drawings, 30% of what is drawn (`bench/testbed/harder.py`). 16 D prompts, 2 T prompts, no gate.\n",
        table(("policy", "copies", "similarity", "useful", "blown up", "T: similarity"), rows),
    ]
