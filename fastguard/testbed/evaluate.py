"""`python -m fastguard.testbed evaluate`: every measurement of docs/testbed, on the test halves.

The policy file was written by `tune` from the tuning halves. Each part below returns JSON values; all of
them go to results.json, README.md (tables.py) and PNG (plots.py). Finished batches are kept in the work
folder, in a place of their own for these weights and this policy.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastguard import policy

from . import Prompt, load, path, plots, policy_path, prompts, sheets, tables
from .baselines import baselines
from .grid import contest, front, transitions
from .measures import Judge
from .run import BATCH, jobs, run
from .split import TEMPLATES
from .stats import auc, over_prompts, spread

ELEMENTS = 512  # of a latent
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
    """A cache that belongs to these weights and this policy."""
    digest = hashlib.sha256()
    for file in sorted(path().rglob("*.safetensors")):
        digest.update(file.read_bytes())
    digest.update(policy_path().read_bytes())
    return work / f"evaluation-{digest.hexdigest()[:12]}"


def rms(row: dict, step: int = 0) -> float:
    """RMS(c - u) of a measured row at a denoiser row."""
    return (row["d_curve"][step] / ELEMENTS) ** 0.5


def describe(rows: list[dict], reference: dict | None = None) -> dict:
    """The columns of the main table for the rows of one kind under one policy."""
    free = [r for r in rows if r["copy"] is False] if rows[0]["copy"] is not None else rows
    fired = [r["transition_timestep"] for r in rows if r["transition_timestep"] is not None]
    faithful = over_prompts(free, "faithful")
    result = {
        "images": len(rows),
        "copies": over_prompts(rows, "copy"),
        "similarity": spread([r["similarity"] for r in rows]),
        "faithful, no copies": faithful,
        "faithful5, no copies": over_prompts(free, "faithful5"),
        "blown": over_prompts(rows, "blown"),
        "transition, median t": float(np.median(fired)) if fired else None,
        "fired": len(fired) / len(rows),
        "forced": sum(bool(r["forced"]) for r in rows) / len(rows),
    }
    if reference and faithful and reference["mean"]:
        result["faithful / ordinary"] = faithful["mean"] / reference["mean"]
    return result


def main_table(pipe: Any, judge: Judge, cache: Path, seeds: int, reference: dict) -> dict:
    """Every preset, ungated, then `dtp` and the model's policy file with the gate, on the memorized test prompts."""
    table: dict = {}
    memorized = prompts("memorized", "test")
    for name in [*PRESETS, GATED, DEFAULT]:
        slug = name.replace(" ", "_")
        rows = run(pipe, judge, f"main-{slug}", jobs(memorized, seeds, make_policy(name)), cache)
        table[name] = {k: describe([r for r in rows if r["kind"] == k], reference) for k in "DT"}
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


def gate(memorized: list[dict], ordinary: list[dict], near: list[dict]) -> dict:
    """AUC at the first row, and what the shipped threshold catches."""
    tau = policy(policy_path()).gate
    m, o = [rms(r) for r in memorized], [rms(r) for r in ordinary]

    def by_prompt(rows: list[dict]) -> list[float]:
        groups: dict = {}
        for row in rows:
            groups.setdefault(row["prompt"], []).append(rms(row))
        return [float(np.mean(v)) for v in groups.values()]

    copied: dict = {}
    for row in memorized:
        copied.setdefault(row["prompt"], []).append(row["copy"])
    truly = {name for name, values in copied.items() if float(np.mean(values)) >= MEMORIZED}
    caught = [v >= tau for v in m]
    copies = [r["copy"] for r in memorized]
    return {
        "threshold": tau,
        "auc, one image": auc(m, o),
        "auc, mean of the seeds": auc(by_prompt(memorized), by_prompt(ordinary)),
        "auc, one image, qualifying": auc([rms(r) for r in memorized if r["prompt"] in truly], o),
        "memorized, qualifying": len(truly),
        "memorized prompts": len(by_prompt(memorized)),
        "ordinary prompts": len(by_prompt(ordinary)),
        "rms memorized": spread(m),
        "rms ordinary": spread(o),
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
    return {
        "images": len(plain),
        "share caught": over_prompts([r | {"caught": c} for r, c in zip(guarded, caught, strict=True)], "caught"),
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
    ordinary, memorized = prompts("ordinary", "test"), prompts("memorized", "test")
    # full batches of the same jobs: their sums are then formed in the same order
    stock = run(pipe, judge, "ordinary-stock", jobs(ordinary, seeds)[: 3 * BATCH], cache)
    plain = run(pipe, judge, "ordinary-cfg", jobs(ordinary, seeds, policy("cfg")), cache)
    reference = over_prompts(plain, "faithful")
    assert reference is not None
    table = main_table(pipe, judge, cache, seeds, reference)
    cfg = run(pipe, judge, "main-none", jobs(memorized, seeds, policy("cfg")), cache)
    near = run(pipe, judge, "near-cfg", jobs(near_prompts(), seeds, policy("cfg")), cache)
    default = jobs(ordinary, seeds, make_policy(DEFAULT))
    guarded = run(pipe, judge, "ordinary-default", default, cache)
    never, grid = transitions(pipe, judge, "test", prompts("D", "test"), seeds, cache)
    ranked = front(pipe, never, grid)
    results = {
        "weights and policy": cache.name.removeprefix("evaluation-"),
        "policy": policy(policy_path()).to_dict(),
        "seeds": seeds,
        "baselines": baselines(judge, work, out / "baselines.json"),
        "ordinary, plain guidance": {key: over_prompts(plain, key) for key in ("faithful", "faithful5", "blown")},
        "qualifying": qualifying(cfg),
        "main": table,
        "gate": gate(cfg, plain, near),
        "ordinary under the default": touched(plain, guarded),
        "ordinary under the default, against stock": touched(stock, guarded),
        "harm without a gate": harm(pipe, judge, cache, seeds, plain),
        "rules": ranked,
        "best rules": contest(pipe, never, grid, ranked),
        "sensitivity": sensitivity(pipe, judge, cache, seeds),
    }
    results["seconds of the last run"] = round(time.time() - started)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "README.md").write_text(tables.page(results))
    plots.all_plots(out, results, cfg, plain, never, pipe)
    shown = prompts("D", "test")
    unguarded, own = (sheets.pictures(pipe, judge, shown, one) for one in (policy("cfg"), make_policy(DEFAULT)))
    sheets.memorized(out / "memorized.png", shown, unguarded, own)
    sheets.ordinary(out / "ordinary.png", ordinary, sheets.pictures(pipe, judge, ordinary, policy("cfg")))
    print(f"wrote {out}")
