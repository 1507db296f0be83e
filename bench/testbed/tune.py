"""Choosing among the paper's transitions on the TUNING halves alone, behind a calibrated gate: what shipped before anchored guidance.

0. The guidance scale of every measurement (`sampling.CALL`) was set by hand from the table that step 0 writes: at 3, 2% of the ordinary
   tuning images are blown up, at 4 it is 8%, at Stable Diffusion's 7.5 it is 35%.
1. The gate: RMS(c - u) at the first row over the ordinary tuning concepts in all twelve templates (780 prompts), grouped by concept:
   prompts of one concept are alike (intraclass correlation 0.8), so 65 units can prove 5% at confidence 0.95 and no less.
2. The rules: of all candidates of `rules.candidates`, replayed on recorded curves, the one of each family with the most useful images
   (no copy AND faithful) on the D tuning prompts.
3. These, and a later fixed timestep, with zero guidance, weak guidance and a few rows of opposite guidance before the transition, run for
   real behind the gate, with four seeds. `choose` keeps one: copies at most half of plain guidance's, non-copies at least 0.8 times as
   faithful as ordinary prompts, and among those the most useful.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from fastguard import policy
from fastguard.files import write_json
from fastguard.pipelines.statistics import collect_gate_statistics
from fastguard.policies.gate import calibrate
from fastguard.testbed import load, prompts
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import CALL

from .grid import front, transitions
from .rules import as_policy
from .run import folder, jobs, run
from .split import TEMPLATES

SEEDS = 2
SCALES = (3.0, 4.0, 5.0, 7.5)
TRIAL_SEEDS = 4  # with two, the faithfulness of two trials of the same policy differed by 0.1
# instead of zero guidance: weak guidance, or opposite guidance for a few rows
BEFORE = (
    {"before": 0.1},
    {"before": 0.2},
    {"before": -1.0, "opposite_steps": 3},
    {"before": -2.0, "opposite_steps": 2},
)
LATER = (681,)  # fixed timesteps that are tried beside the best rules
FPR, CONFIDENCE = 0.05, 0.95  # of concepts of which any prompt is caught
FAITHFUL = 0.8  # of ordinary prompts' faithfulness, wanted of images that are no copies
HALVED = 0.5  # of plain guidance's copies: no more are wanted


def calibration_prompts() -> tuple[list[str], list[str]]:
    """Every ordinary tuning concept in every template, and of each its concept."""
    pairs = [(template.format(x=p.concept), p.concept) for p in prompts("ordinary", "tuning") for template in TEMPLATES]
    return [prompt for prompt, _ in pairs], [concept for _, concept in pairs]


def first_differences(pipe, cache: Path) -> tuple[list[float], list[str]]:
    """RMS(c - u) at the first row of every calibration prompt, and its concept; kept in `cache`, whose name has to know all it hangs on."""
    ordinary, concepts = calibration_prompts()
    path = cache / "gate.json"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, collect_gate_statistics(pipe, ordinary, batch_size=64, progress=True, **CALL))
    return json.loads(path.read_text()), concepts


def tuning_folder(work: Path) -> Path:
    """A cache that belongs to these weights, the calibration prompts and the call."""
    return folder(work, "tuning", json.dumps([calibration_prompts(), CALL]).encode())


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


def bases(ranked: list[dict]) -> list[dict]:
    """The rules that are run for real: the most useful of each family, and LATER."""
    best = [next(c for c in ranked if c["family"] == family) for family in ("static", "minimum", "drop in x0")]
    return best + [
        c for c in ranked if c["family"] == "static" and c["parameters"]["t_star"] in LATER and c not in best
    ]


def choose(tried: dict[str, dict], wanted: dict[str, float]) -> str:
    """The most useful trial of those that grant both wishes; if none does, of those that halve the copies."""
    sound = {k: v for k, v in tried.items() if v["blown"] <= 0.02 and v["faithful"] is not None}
    halved = {k: v for k, v in sound.items() if v["copies"] <= wanted["copies"]} or sound
    both = {k: v for k, v in halved.items() if v["faithful"] >= wanted["faithful"]}
    return max(both or halved, key=lambda k: halved[k]["useful"])


def tune(work: Path, out: Path) -> None:
    """Write tuning.json to `out`."""
    pipe = load()
    judge, cache = Judge(pipe), tuning_folder(work)
    out.mkdir(parents=True, exist_ok=True)
    values, concepts = first_differences(pipe, cache)
    gate = calibrate(values, FPR, CONFIDENCE, groups=concepts)

    memorized = prompts("D", "tuning")
    plain = run(pipe, judge, "tuning-cfg", jobs(memorized, TRIAL_SEEDS, policy("cfg")), cache)
    caught = [(r["d_curve"][0] / 512) ** 0.5 >= gate.threshold for r in plain]
    never, table = transitions(pipe, judge, "tuning", memorized, SEEDS, cache)
    ranked = sorted(front(pipe, never, table), key=lambda c: -c["useful"])
    table_of_scales = scales(pipe, judge, cache)
    wanted = {
        "copies": HALVED * useful(plain)["copies"],
        "faithful": FAITHFUL * table_of_scales[f"{CALL['guidance_scale']:g}"]["ordinary"]["faithful"],
    }
    trials = {}
    for rule, before in itertools.product(bases(ranked), ({}, *BEFORE)):
        label = [rule["family"], *(f"{k} {v:g}" for k, v in {**rule["parameters"], **before}.items() if v is not None)]
        trials[", ".join(label)] = as_policy(rule, **before)
    tried = {}
    for name, trial in trials.items():
        slug = "tuning-trial-" + name.replace(", ", "-").replace(" ", "_")
        rows = run(pipe, judge, slug, jobs(memorized, TRIAL_SEEDS, trial), cache)
        # The gate's threshold is known by now: an image that it does not catch is plain guidance's.
        tried[name] = useful([row if c else p for row, c, p in zip(rows, caught, plain, strict=True)])
    winner = choose(tried, wanted)
    report = {
        "guidance scales": table_of_scales,
        "gate": gate.to_dict(),
        "caught of the D tuning images": float(np.mean(caught)),
        "plain guidance": useful(plain),
        "wanted": wanted,
        "trials": tried,
        "kept": winner,
        "candidates": ranked,
    }
    (out / "tuning.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "candidates"}, indent=1))
