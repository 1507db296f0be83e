"""`python -m bench.testbed confirm`: the shipped policy once more, on draws that nobody has looked at.

The gate was mended with a table of the test half in sight, so that table cannot judge it. Here weights and policy stay as they are and
everything is drawn anew: seeds that no other measurement uses and, for ordinary concepts, every phrase but the one that the split gave
to their prompt. The concepts are those of the test half, there are no others. Intervals are over concepts: the phrases of one are alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastguard import policy
from fastguard.files import write_json
from fastguard.testbed import Prompt, load, policy_path, prompts
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import Sample

from .evaluate import DEFAULT, describe, folder, make_policy
from .run import run
from .split import TEMPLATES
from .stats import over_prompts

FIRST_SEED = 1000  # all others measure seeds 0, 1, 2 ...
D_SEEDS, ORDINARY_SEEDS = 8, 1


def fresh(chosen: list[Prompt], seeds: int, one: Any) -> list[Sample]:
    """All of `chosen` under one policy, with seeds from FIRST_SEED on."""
    return [Sample(p, FIRST_SEED + s, one) for p in chosen for s in range(seeds)]


def other_phrases() -> list[Prompt]:
    """The ordinary concepts of the test half in the phrases that the split did not choose."""
    return [
        Prompt(text, p.concept, p.kind, p.half, p.factor, p.index)
        for p in prompts("ordinary", "test")
        for text in (template.format(x=p.concept) for template in TEMPLATES)
        if text != p.prompt
    ]


def by_concept(rows: list[dict], work: list[Sample]) -> list[dict]:
    """The same rows, grouped by their concept where intervals are formed."""
    return [row | {"prompt": job.prompt.concept} for row, job in zip(rows, work, strict=True)]


def confirm(out: Path, work: Path) -> dict:
    """Measure, and write confirmed.json to `out`. Resumable; finished batches are kept in `work`."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = load()
    judge, cache = Judge(pipe), folder(work)
    rows: dict[str, list[dict]] = {}
    for kind, chosen, seeds in (
        ("D", prompts("D", "test"), D_SEEDS),
        ("ordinary", other_phrases(), ORDINARY_SEEDS),
    ):
        for name, one in (("plain", policy("cfg")), ("default", make_policy(DEFAULT))):
            todo = fresh(chosen, seeds, one)
            rows[f"{kind}, {name}"] = by_concept(run(pipe, judge, f"confirm-{kind}-{name}", todo, cache), todo)
    plain, guarded = rows["ordinary, plain"], rows["ordinary, default"]
    touched = [r | {"touched": bool(r["gate"]["caught"])} for r in guarded]
    caught = [r | {"caught": bool(r["gate"]["caught"])} for r in rows["D, default"]]
    result = {
        "weights and policy": cache.name.removeprefix("evaluation-"),
        "policy": policy(policy_path()).to_dict(),
        "first seed": FIRST_SEED,
        "D, plain guidance": describe(rows["D, plain"], plain),
        "D, default": describe(rows["D, default"], plain),
        "D, caught": over_prompts(caught, "caught"),
        "ordinary, plain guidance": {key: over_prompts(plain, key) for key in ("faithful", "blown")},
        "ordinary, touched": over_prompts(touched, "touched"),
        "ordinary, touched by concept": _counts([r["prompt"] for r in touched if r["touched"]]),
        "ordinary, not touched but different": sum(
            a["hash"] != b["hash"] and not b["touched"] for a, b in zip(plain, touched, strict=True)
        ),
    }
    write_json(out / "confirmed.json", result)
    return result


def _counts(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}
