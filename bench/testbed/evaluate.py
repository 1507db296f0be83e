"""`python -m bench.testbed evaluate`: every measurement of docs/testbed, on the test halves.

The policy file was written by `tune` from the tuning halves. Each part below returns JSON values; all of
them go to results.json, README.md (tables.py) and PNG (plots.py). Finished batches are kept in the work
folder, in a place of their own for these weights and this policy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastguard import policy
from fastguard.testbed import Prompt, load, policy_path, prompts
from fastguard.testbed.measures import Judge

from . import facts, plots, sheets, tables
from .baselines import baselines
from .grid import contest, front, noise, transitions
from .run import BATCH, jobs, rms, run
from .run import folder as run_folder
from .split import TEMPLATES
from .stats import auc_over_prompts, over_prompts, prompts_with, ratio, spread

PRESETS: dict[str, Any] = {
    "none": ("cfg", {}),
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
}
GATED, DEFAULT = "dtp (gated)", "default (gated)"
MEMORIZED = 0.8  # share of unguarded seeds that are copies, from which on a prompt counts as memorized


def make_policy(name: str) -> Any:
    """A policy of the main table by its row's name."""
    if name == DEFAULT:
        return policy(policy_path())
    if name == GATED:
        return policy("dtp", gate=policy(policy_path()).gate)
    preset, fields = PRESETS[name]
    return policy(preset, **fields)


def folder(work: Path) -> Path:
    """A cache that belongs to these weights, this classifier and this policy."""
    return run_folder(work, "evaluation", json.dumps(policy(policy_path()).to_dict()).encode())


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


def main_table(pipe: Any, judge: Judge, cache: Path, seeds: int, ordinary: list[dict]) -> dict:
    """Every preset, ungated, then `dtp` and the model's policy file with the gate, on the memorized test prompts."""
    table: dict = {}
    memorized = prompts("memorized", "test")
    for name in [*PRESETS, GATED, DEFAULT]:
        slug = name.replace(" ", "_")
        rows = run(pipe, judge, f"main-{slug}", jobs(memorized, seeds, make_policy(name)), cache)
        table[name] = {k: describe([r for r in rows if r["kind"] == k], ordinary) for k in "DT"}
    return table


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


def without_twins(cfg: list[dict], guarded: list[dict], ordinary: list[dict], twins: Mapping[str, float]) -> dict:
    """D prompts whose duplicated drawing has no near twin among the drawings that share its caption, unguarded and under the default."""
    parts = {
        name: [r for r in rows if r["kind"] == "D" and r["prompt"] not in twins]
        for name, rows in (("none", cfg), ("default", guarded))
    }
    with_twin = sorted({r["prompt"] for r in cfg if r["kind"] == "D"} & set(twins))
    return {"with a twin": with_twin} | {name: describe(rows, ordinary) for name, rows in parts.items()}


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
            "copies": sum(r["copy"] for r in near),
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
    """Ordinary prompts under the gated default: caught, and whether the others are the same to the bit."""
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


def harm(pipe: Any, judge: Judge, cache: Path, seeds: int, plain: list[dict]) -> dict:
    """What ungated presets do to ordinary prompts (50 of them)."""
    some = prompts("ordinary", "test")[:50]
    names = {p.prompt for p in some}
    rows = {"none": [r for r in plain if r["prompt"] in names]}
    own = policy(policy_path(), gate=None)
    trials = {n: make_policy(n) for n in ("stp", "dtp", "og+dtp", "paper-dtp")}
    for name, one in {**trials, "default without its gate": own}.items():
        slug = name.replace(" ", "_")
        rows[name] = run(pipe, judge, f"harm-{slug}", jobs(some, seeds, one), cache)
    return {
        name: {
            "faithful": over_prompts(part, "faithful"),
            "blown": over_prompts(part, "blown"),
            "fired": sum(r["transition_step"] is not None for r in part) / len(part),
        }
        for name, part in rows.items()
    }


def evaluate(out: Path, work: Path, seeds: int = 4) -> None:
    """Run everything and write results.json, README.md and the plots to `out`."""
    from .sensitivity import sensitivity

    started, pipe = time.time(), load()
    judge, cache = Judge(pipe), folder(work)
    out.mkdir(parents=True, exist_ok=True)
    measured = baselines(judge, work, out / "baselines.json")  # first: without drawings or a file of theirs it refuses
    ordinary, memorized = prompts("ordinary", "test"), prompts("memorized", "test")
    # full batches of the same jobs: their sums are then formed in the same order
    stock = run(pipe, judge, "ordinary-stock", jobs(ordinary, seeds)[: 3 * BATCH], cache)
    plain = run(pipe, judge, "ordinary-cfg", jobs(ordinary, seeds, policy("cfg")), cache)
    table = main_table(pipe, judge, cache, seeds, plain)
    cfg = run(pipe, judge, "main-none", jobs(memorized, seeds, policy("cfg")), cache)
    near = run(pipe, judge, "near-cfg", jobs(near_prompts(), seeds, policy("cfg")), cache)
    guarded = run(pipe, judge, "ordinary-default", jobs(ordinary, seeds, make_policy(DEFAULT)), cache)
    shown = prompts("D", "test")
    never, images = transitions(pipe, judge, "test", shown, seeds, cache)
    ranked = front(pipe, never, images)
    paper, own = (
        [
            r
            for r in run(pipe, judge, f"main-{slug}", jobs(memorized, seeds, make_policy(name)), cache)
            if r["kind"] == "D"
        ]
        for name, slug in (("paper-dtp", "paper-dtp"), (DEFAULT, DEFAULT.replace(" ", "_")))
    )
    results = {
        "weights and policy": cache.name.removeprefix("evaluation-"),
        "policy": policy(policy_path()).to_dict(),
        "seeds": seeds,
        "baselines": measured,
        "ordinary, plain guidance": {key: over_prompts(plain, key) for key in ("faithful", "faithful5", "blown")},
        "qualifying": qualifying(cfg),
        "D without twins": without_twins(cfg, own, plain, measured["twins"]["memorized"]),
        "main": table,
        "gate": gate(cfg, plain, near),
        "ordinary under the default": touched(plain, guarded),
        "ordinary under the default, against stock": touched(stock, guarded),
        "harm without a gate": harm(pipe, judge, cache, seeds, plain),
        "rules": ranked,
        "best rules": contest(pipe, judge, shown, seeds, cache, ranked),
        "sensitivity": sensitivity(pipe, judge, cache, seeds),
        "facts": {
            "minima of the bare rule, D": facts.minima(paper),
            "medians under zero guidance, D": facts.medians(never, noise(pipe)),
            "D under the default": facts.behind_the_gate(own),
            "calibration": facts.calibration(pipe, work, cfg, plain),
            "cfg against stock": facts.from_stock(pipe, jobs(ordinary, seeds), jobs(ordinary, seeds, policy("cfg"))),
        },
    }
    results["seconds of the last run"] = round(time.time() - started)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "README.md").write_text(tables.page(results))
    plots.all_plots(out, results, cfg, plain, never, pipe)
    before, after = (sheets.pictures(pipe, judge, shown, one) for one in (policy("cfg"), make_policy(DEFAULT)))
    sheets.memorized(out / "memorized.png", shown, before, after)
    sheets.ordinary(out / "ordinary.png", ordinary, sheets.pictures(pipe, judge, ordinary, policy("cfg")))
    print(f"wrote {out}")
