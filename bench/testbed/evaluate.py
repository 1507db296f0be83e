"""`python -m bench.testbed evaluate`: the presets, the gate and the ordinary prompts of docs/testbed, on the test halves.

Each part below returns JSON values; all of them go to results.json, and with rules.json (`rules`) and anchored-test.json (`anchored-test`, whose rows
are used here, too) to README.md (tables.py) and PNG (plots.py). Finished batches are kept in the work folder, in a place of their own for these weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastguard import policy
from fastguard.files import read_json, write_json
from fastguard.testbed import Prompt, load, policy_path, prompts
from fastguard.testbed.measures import Judge

from . import facts, plots, sheets, tables
from .anchored_test import FIRST, SEEDS, behind, cache_of, first_rows, slug
from .baselines import baselines
from .grid import contest, front, noise, transitions
from .run import jobs, rms, run
from .split import TEMPLATES
from .stats import auc_over_prompts, over_prompts, prompts_with, ratio, spread

FREE, SHIPPED = "no guard", "shipped policy"
PRESETS: dict[str, Any] = {
    FREE: ("cfg", {}),
    "conditional only": ("stp", {"before": "conditional", "t_star": 0}),
    "unconditional only": ("stp", {"t_star": 0}),
    "stp 800": ("stp", {"t_star": 800}),
    "stp 650": ("stp", {"t_star": 650}),
    "stp": ("stp", {}),
    "stp 300": ("stp", {"t_star": 300}),
    "og+stp": ("og+stp", {}),
    "dtp": ("dtp", {}),
    "og+dtp": ("og+dtp", {}),
    "paper-dtp": ("paper-dtp", {}),
    "paper-og+dtp": ("paper-og+dtp", {}),
    "released-dtp": ("released-dtp", {}),
    "anchored": ("anchored", {}),
}
MEMORIZED = 0.8  # share of unguarded seeds that are copies, from which on a prompt counts as memorized
HARMED = 50  # ordinary prompts that the presets are tried on without a gate


def make_policy(name: str) -> Any:
    """A policy of the main table by its row's name."""
    preset, fields = PRESETS[name]
    return policy(preset, **fields)


def memorized_rows(pipe: Any, judge: Judge, cache: Path, name: str) -> list[dict]:
    """All D and T test prompts under a row of the main table; those of FREE, stp, dtp, og+dtp and anchored are `anchored-test`'s, too."""
    work = jobs(prompts("D", "test") + prompts("T", "test"), SEEDS, make_policy(name))
    return run(pipe, judge, slug(FIRST, "cfg" if name == FREE else name), work, cache)


def describe(rows: list[dict], ordinary: list[dict] | None = None) -> dict:
    """The columns of the main table for the rows of one kind under one policy; `ordinary`: plain guidance's, to compare faithfulness with."""
    free = [r for r in rows if r["copy"] is False] if rows[0]["copy"] is not None else rows
    fired = [r["transition_timestep"] for r in rows if r["transition_timestep"] is not None]
    result = {
        "images": len(rows),
        "copies": over_prompts(rows, "copy"),
        "similarity": spread(rows, "similarity"),
        "faithful, no copies": over_prompts(free, "faithful"),
        "faithful5, no copies": over_prompts(free, "faithful5"),
        "faithful, copies": over_prompts([r for r in rows if r["copy"]], "faithful"),
        "blown": over_prompts(rows, "blown"),
        "transition, median t": float(np.median(fired)) if fired else None,
        "fired": len(fired) / len(rows),
        "forced": sum(bool(r["forced"]) for r in rows) / len(rows),
    }
    if ordinary is not None:
        result["faithful / ordinary"] = ratio(free, ordinary, "faithful")
    return result


def main_table(rows: Mapping[str, list[dict]], ordinary: list[dict], carried: Mapping[str, dict]) -> dict:
    """Every preset without a gate, those `carried` as they are, then the shipped policy."""
    all_rows = {**rows, SHIPPED: behind(rows[FREE], rows["anchored"])}
    made = {
        n: {k: describe([r for r in some if r["kind"] == k], ordinary) for k in "DT"} for n, some in all_rows.items()
    }
    return {name: made.get(name) or carried[name] for name in (*PRESETS, SHIPPED)}


def qualifying(rows: list[dict]) -> dict:
    """Prompts of which at least 80% of the unguarded seeds are copies, by kind and factor."""
    share: dict = {}
    for row in rows:
        share.setdefault(row["prompt"], []).append(row["copy"])
    result: dict = {}
    for p in prompts("memorized", "test"):
        cell = result.setdefault(f"{p.kind} x{p.factor}", {"prompts": 0, "memorized": 0})
        cell["prompts"] += 1
        cell["memorized"] += float(np.mean(share[p.prompt])) >= MEMORIZED
    for kind in "DT":
        cells = [v for k, v in result.items() if k[0] == kind]
        result[kind] = {key: sum(c[key] for c in cells) for key in ("prompts", "memorized")}
    return result


def without_twins(rows: Mapping[str, list[dict]], ordinary: list[dict], twins: Mapping[str, float]) -> dict:
    """D prompts whose duplicated drawing has no near twin among the drawings that share its caption, by policy."""
    parts = {name: [r for r in some if r["kind"] == "D" and r["prompt"] not in twins] for name, some in rows.items()}
    with_twin = sorted({r["prompt"] for r in next(iter(rows.values())) if r["kind"] == "D"} & set(twins))
    return {"with a twin": with_twin} | {name: describe(some, ordinary) for name, some in parts.items()}


def gate(memorized: list[dict], ordinary: list[dict], near: list[dict]) -> dict:
    """AUC at the first row, and what the shipped threshold catches."""
    tau = policy(policy_path()).gate
    m, o = [rms(r) for r in memorized], [rms(r) for r in ordinary]

    def first(rows: list[dict]) -> list[dict]:
        return [{"prompt": r["prompt"], "first": rms(r)} for r in rows]

    def by_prompt(rows: list[dict]) -> list[dict]:
        groups: dict = {}
        for row in rows:
            groups.setdefault(row["prompt"], []).append(rms(row))
        return [{"prompt": name, "first": float(np.mean(v))} for name, v in groups.items()]

    copied: dict = {}
    for row in memorized:
        copied.setdefault(row["prompt"], []).append(row["copy"])
    truly = {name for name, values in copied.items() if float(np.mean(values)) >= MEMORIZED}
    caught = [v >= tau for v in m]
    copies = [r["copy"] for r in memorized]
    return {
        "threshold": tau,
        "auc, one image": auc_over_prompts(first(memorized), first(ordinary), "first"),
        "auc, mean of the seeds": auc_over_prompts(by_prompt(memorized), by_prompt(ordinary), "first"),
        "auc, one image, qualifying": auc_over_prompts(
            first([r for r in memorized if r["prompt"] in truly]), first(ordinary), "first"
        ),
        "memorized, qualifying": len(truly),
        "memorized prompts": len(by_prompt(memorized)),
        "ordinary prompts": len(by_prompt(ordinary)),
        "rms memorized": spread(first(memorized), "first"),
        "rms ordinary": spread(first(ordinary), "first"),
        "memorized images caught": sum(caught),
        "memorized images missed": len(caught) - sum(caught),
        "copies missed": sum(c and not k for c, k in zip(copies, caught, strict=True)),
        "copies": sum(copies),
        "ordinary images touched": sum(v >= tau for v in o),
        "ordinary images": len(o),
        "near captions": {
            "images": len(near),
            "caught": sum(rms(r) >= tau for r in near),
        },
    }


def near_prompts() -> list[Prompt]:
    """For every D test prompt one other template of the same concept: ordinary captions next door."""
    result = []
    for i, p in enumerate(prompts("D", "test")):
        others = [t.format(x=p.concept) for t in TEMPLATES]
        others.remove(p.prompt)
        result.append(Prompt(others[i % len(others)], p.concept, "near", p.half, p.factor, p.index))
    return result


def touched(plain: list[dict], guarded: list[dict]) -> dict:
    """Ordinary prompts under the shipped policy: caught, and whether the others are the same to the bit."""
    guarded = guarded[: len(plain)]
    caught = [bool(r["gate"]["caught"]) for r in guarded]
    same = [a["hash"] == b["hash"] for a, b in zip(plain, guarded, strict=True)]
    known = [r | {"caught": c} for r, c in zip(guarded, caught, strict=True)]
    return {
        "images": len(plain),
        "share caught": over_prompts(known, "caught"),
        "prompts caught": prompts_with(known, "caught"),
        "caught": sum(caught),
        "released and bit-identical": sum(s and not c for s, c in zip(same, caught, strict=True)),
        "released but different": sum(not s and not c for s, c in zip(same, caught, strict=True)),
    }


def harm(pipe: Any, judge: Judge, cache: Path, plain: list[dict], carried: Mapping[str, dict]) -> dict:
    """What presets without a gate do to ordinary prompts: HARMED of them (unless `carried`), and all under `anchored`."""
    everyday = prompts("ordinary", "test")
    some = everyday[:HARMED]
    names = {p.prompt for p in some}
    anchored = run(pipe, judge, slug("ordinary", "anchored"), jobs(everyday, SEEDS, policy("anchored")), cache)
    rows = {FREE: [r for r in plain if r["prompt"] in names], "anchored": [r for r in anchored if r["prompt"] in names]}
    for name in ("stp", "dtp", "og+dtp"):
        if name not in carried:
            rows[name] = run(pipe, judge, slug("harm", name), jobs(some, SEEDS, policy(name)), cache)
    rows |= {f"{FREE}, all prompts": plain, "anchored, all prompts": anchored}
    return dict(carried) | {
        name: {
            "prompts": len({r["prompt"] for r in part}),
            **{key: over_prompts(part, key) for key in ("faithful", "blown")},
        }
        for name, part in rows.items()
    }


def dtypes(reference: list[dict]) -> dict:
    """How often the gate decides otherwise in other dtypes; reference: plain guidance's rows in float32 of the D, T and ordinary test prompts, in this order."""
    work = [j for kind in ("D", "T", "ordinary") for j in jobs(prompts(kind, "test"), SEEDS, policy("cfg"))]
    tau, result = policy(policy_path()).gate, {}
    for dtype in (torch.float16, torch.bfloat16):
        found = first_rows(load(torch_dtype=dtype), work, {})
        flips = [
            {"prompt": a["prompt"], "flip": (rms(a) >= tau) != (rms(b) >= tau)}
            for a, b in zip(found, reference, strict=True)
        ]
        result[str(dtype).removeprefix("torch.")] = {"images": len(flips), "gate flips": over_prompts(flips, "flip")}
    return result


def evaluate(out: Path, work: Path, carry: Path | None = None) -> None:
    """Run everything and write results.json, README.md and the plots to `out`; rules.json and anchored-test.json are there.

    carry: a file with presets' entries of "main" and of "harm without a gate" that an earlier version measured on these weights: not run again.
    """
    pipe = load()
    judge, cache = Judge(pipe), cache_of(work)
    out.mkdir(parents=True, exist_ok=True)
    measured = baselines(judge, work, out / "baselines.json")  # first: without drawings or a file of theirs it refuses
    everyday, shipped = prompts("ordinary", "test"), policy(policy_path())
    plain = run(pipe, judge, slug("ordinary", "cfg"), jobs(everyday, SEEDS, policy("cfg")), cache)
    guarded = run(pipe, judge, slug("ordinary", "gated"), jobs(everyday, SEEDS, shipped), cache)
    old: dict[str, Any] = {"main": {}, "harm without a gate": {}} if carry is None else read_json(carry)
    rows = {name: memorized_rows(pipe, judge, cache, name) for name in PRESETS if name not in old["main"]}
    near = first_rows(pipe, jobs(near_prompts(), SEEDS, policy("cfg")), {})
    results = {
        "weights": cache.name.removeprefix("anchored-test-"),
        "policy": shipped.to_dict(),
        "seeds": SEEDS,
        "baselines": measured,
        "ordinary, plain guidance": {key: over_prompts(plain, key) for key in ("faithful", "faithful5", "blown")},
        "qualifying": qualifying(rows[FREE]),
        "D without twins": without_twins(
            {name: rows[name] for name in (FREE, "anchored")}, plain, measured["twins"]["memorized"]
        ),
        "main": main_table(rows, plain, old["main"]),
        "of version 0.1": {part: list(old[part]) for part in ("main", "harm without a gate")},
        "gate": gate(rows[FREE], plain, near),
        "ordinary under the shipped policy": touched(plain, guarded),
        "harm without a gate": harm(pipe, judge, cache, plain, old["harm without a gate"]),
        "dtypes": dtypes([*rows[FREE], *plain]),
    }
    write_json(out / "results.json", results)
    plots.presets(out / "presets.png", results)
    plots.gate(out / "gate.png", results, rows[FREE], plain)
    shown = prompts("D", "test")
    before, after = (sheets.pictures(pipe, judge, shown, one) for one in (policy("cfg"), shipped))
    sheets.memorized(out / "memorized.png", shown, before, after)
    if not (out / "ordinary.png").exists():  # it hangs on the weights alone
        sheets.ordinary(out / "ordinary.png", everyday, sheets.pictures(pipe, judge, everyday, policy("cfg")))
    write_page(out)


def write_page(out: Path) -> None:
    """README.md of the three files of numbers in `out`."""
    (out / "README.md").write_text(
        tables.page(*(read_json(out / f"{n}.json") for n in ("results", "anchored-test", "rules")))
    )


def rules(out: Path, work: Path) -> None:
    """`python -m bench.testbed rules`: which rule detects the transition best, on the D test prompts; rules.json and two plots go to `out`."""
    pipe = load()
    judge, cache, shown = Judge(pipe), cache_of(work), prompts("D", "test")
    out.mkdir(parents=True, exist_ok=True)
    never, images = transitions(pipe, judge, "test", shown, SEEDS, cache)
    ranked = front(pipe, never, images)
    plain = run(pipe, judge, slug("ordinary", "cfg"), jobs(prompts("ordinary", "test"), SEEDS, policy("cfg")), cache)
    paper, free = (memorized_rows(pipe, judge, cache, name) for name in ("paper-dtp", FREE))
    found = {
        "rules": ranked,
        "best rules": contest(pipe, judge, shown, SEEDS, cache, ranked),
        "minima of the bare rule, D": facts.minima([r for r in paper if r["kind"] == "D"]),
        "medians under zero guidance, D": facts.medians(never, noise(pipe)),
        "ordinary, plain guidance": {"faithful": over_prompts(plain, "faithful")},
    }
    write_json(out / "rules.json", found)
    plots.rules(out / "rules.png", found)
    plots.curves(out / "curves.png", never, free, plain, pipe)
