"""Choosing the default policy on the TUNING halves alone, and calibrating its gate.

0. The guidance scale of every measurement (`run.CALL`) was set by hand from the table that step 0 writes: at 3, 2% of the ordinary
   tuning images are blown up, at 4 it is 9%, at Stable Diffusion's 7.5 it is 44%.
1. The gate: RMS(c - u) at the first row over the ordinary tuning concepts in all twelve templates
   (780 prompts), `calibrate` at fpr 0.01 and confidence 0.95. Prompts of one concept are not quite
   independent of one another; policy.json says so.
2. The rule: of all candidates of `rules.candidates`, the one with the most useful images (no copy AND
   faithful) on the D tuning prompts.
3. Opposite guidance for the first rows, then that rule with its own or an earlier deadline, run for real. Kept if it is more useful;
   where some trials leave non-copies at least 0.8 times as faithful as ordinary prompts, one of these.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastguard import Policy, policy
from fastguard.calibrate import calibrate, collect_gate_statistics

from . import load, policy_path, prompts
from .grid import front, transitions
from .measures import Judge
from .run import CALL, jobs, run
from .split import TEMPLATES

SEEDS = 2
SCALES = (3.0, 4.0, 5.0, 7.5)
OPPOSITE = (-1.0, -2.0, -4.0)  # g
OPPOSITE_ROWS = (2, 3, 5)
EARLIER = (None, 760.0, 820.0)  # deadline; None: the rule's own
FAITHFUL = 0.8  # of ordinary prompts' faithfulness, wanted of images that are no copies
FAMILIES = {
    "static": lambda v: {"transition": "static", "t_star": v["t_star"]},
    "minimum": lambda v: {"transition": "dynamic", "rule": "minimum", **v},
    "drop in x0": lambda v: {"transition": "dynamic", "rule": "drop", "magnitude": "x0", **v},
    "drop in output": lambda v: {"transition": "dynamic", "rule": "drop", **v},
}


def calibration_prompts() -> list[str]:
    """Every ordinary tuning concept in every template."""
    concepts = [p.concept for p in prompts("ordinary", "tuning")]
    return [template.format(x=concept) for concept in concepts for template in TEMPLATES]


def as_policy(choice: dict, **fields) -> Policy:
    """A candidate rule as a policy."""
    values = {"before": "zero", **FAMILIES[choice["family"]](choice["parameters"]), **fields}
    return Policy(**values)


def useful(rows: list[dict]) -> dict:
    """The numbers on which a choice rests."""
    free = [r for r in rows if not r["copy"]]
    return {
        "copies": float(np.mean([r["copy"] for r in rows])),
        "faithful": float(np.mean([r["faithful"] for r in free])) if free else None,
        "useful": float(np.mean([not r["copy"] and r["faithful"] for r in rows])),
        "blown": float(np.mean([r["blown"] for r in rows])),
    }


def scales(pipe, judge: Judge, cache: Path) -> dict:
    """Plain guidance by scale: what ordinary tuning images and D tuning images are like."""
    table = {}
    for scale in SCALES:
        row = {}
        for kind in ("ordinary", "D"):
            work = jobs(prompts(kind, "tuning"), SEEDS, policy("cfg"))
            rows = run(pipe, judge, f"tuning-scale{scale:g}-{kind}", work, cache, guidance_scale=scale)
            row[kind] = {key: float(np.mean([bool(r[key]) for r in rows])) for key in ("faithful", "blown", "copy")}
        table[f"{scale:g}"] = row
    return table


def tune(work: Path, out: Path) -> None:
    """Write policy.json and `out/tuning.json`."""
    pipe = load()
    judge, cache = Judge(pipe), work / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    path = cache / "gate.json"
    if not path.exists():
        values = collect_gate_statistics(pipe, calibration_prompts(), batch_size=64, progress=True, **CALL)
        cache.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    gate = calibrate(json.loads(path.read_text()), fpr=0.01, confidence=0.95)

    memorized = prompts("D", "tuning")
    plain = run(pipe, judge, "tuning-cfg", jobs(memorized, SEEDS, policy("cfg")), cache)
    caught = [(r["d_curve"][0] / 512) ** 0.5 >= gate.threshold for r in plain]
    never, table = transitions(pipe, judge, "tuning", memorized, SEEDS, cache)
    ranked = sorted(front(pipe, never, table), key=lambda c: -c["useful"])
    best = next(c for c in ranked if c["blown"] <= 0.02)
    table_of_scales = scales(pipe, judge, cache)
    enough = FAITHFUL * table_of_scales[f"{CALL['guidance_scale']:g}"]["ordinary"]["faithful"]
    trials = {"zero guidance": as_policy(best)}
    for g, rows, deadline in itertools.product(OPPOSITE, OPPOSITE_ROWS, EARLIER):
        fields = {"before": g, "opposite_steps": rows, **({} if deadline is None else {"deadline": deadline})}
        if deadline is None or best["family"] != "static":
            trials[", ".join(f"{k} {v:g}" for k, v in fields.items())] = as_policy(best, **fields)
    tried = {}
    for i, (name, trial) in enumerate(trials.items()):
        slug = f"tuning-trial-{i}"
        tried[name] = useful(run(pipe, judge, slug, jobs(memorized, SEEDS, trial), cache))
    good = {k: v for k, v in tried.items() if v["blown"] <= 0.02}
    faithful = {k: v for k, v in good.items() if v["faithful"] is not None and v["faithful"] >= enough}
    winner = max(faithful or good, key=lambda k: good[k]["useful"])
    chosen = replace(trials[winner], name="testbed", gate=gate.threshold)
    note = {
        "model": "fastguard/testbed/model",
        "gate": gate.to_dict(),
        "exchangeability": f"{gate.prompts} prompts made of {len(prompts('ordinary', 'tuning'))} concepts "
        f"in {len(TEMPLATES)} templates: prompts of one concept are dependent, so the stated confidence "
        "is optimistic; by concepts alone the sample would be too small for fpr 0.01",
        "rule": "most useful on the D tuning prompts",
        "call": CALL,
    }
    chosen.save(policy_path(), provenance=note)
    report = {
        "guidance scales": table_of_scales,
        "gate": gate.to_dict(),
        "caught of the D tuning images": float(np.mean(caught)),
        "plain guidance": useful(plain),
        "chosen rule, simulated": best,
        "trials": tried,
        "faithfulness wanted": enough,
        "kept": winner,
        "candidates": ranked,
    }
    (out / "tuning.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "candidates"}, indent=1))
