"""`python -m bench.testbed anchored-test`: the library's guards on the TEST halves of both models, once, by the protocol of docs/anchored.md.

An image of a gated row is the guarded one where plain guidance's first difference reaches the gate, and plain guidance's elsewhere: the gate looks at
the first row alone, and what it does not catch keeps its bits. On the ordinary images of the first condition the gated policy itself is run, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers

from fastguard import policy
from fastguard.files import read_json, write_json
from fastguard.testbed import load, policy_path, prompts
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import Sample, generate

from . import harder
from .run import BATCH, folder, jobs, rms, run
from .stats import over_prompts, spread

SEEDS = 4
GATE: float = policy(policy_path()).gate  # type: ignore[assignment]  # one for all: catches 10% of the ordinary tuning images
METHODS = ("cfg", "anchored", "og+dtp", "dtp", "stp")
FIRST = "DDIM, 50 steps, scale 3"
CONDITIONS: dict[str, tuple[str | None, dict[str, Any]]] = {
    FIRST: (None, {}),
    "scale 2": (None, {"guidance_scale": 2.0}),
    "scale 5": (None, {"guidance_scale": 5.0}),
    "scale 7.5": (None, {"guidance_scale": 7.5}),
    "scale 15": (None, {"guidance_scale": 15.0}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "25 steps": (None, {"num_inference_steps": 25}),
    "100 steps": (None, {"num_inference_steps": 100}),
}
"""Name -> (scheduler class or None for the shipped DDIM, arguments of the call); what a name does not say is FIRST's."""
Rows = list[dict[str, Any]]


def describe(rows: Rows) -> dict[str, Any]:
    """The columns of the table with intervals over prompts. Useful: no copy, faithful, not blown up."""
    rows = [row | {"useful": not row["copy"] and row["faithful"] and not row["blown"]} for row in rows]
    free = [row for row in rows if not row["copy"]]
    result: dict[str, Any] = {"images": len(rows), "faithful, no copies": over_prompts(free, "faithful")}
    result |= {key: over_prompts(rows, key) for key in ("copy", "useful", "blown")}
    return result | {"similarity": spread(rows, "similarity")}


def behind(plain: Rows, guarded: Rows) -> Rows:
    """The rows of a gated policy, image by image."""
    return [g if rms(p) >= GATE else p for p, g in zip(plain, guarded, strict=True)]


def caught(rows: Sequence[dict]) -> dict[str, Any]:
    """Share of the images of plain guidance that the gate catches."""
    return over_prompts([row | {"caught": rms(row) >= GATE} for row in rows], "caught") or {}


def cache_of(work: Path) -> Path:
    """Where the rows of both models' test halves are kept."""
    return folder(work, "anchored-test", (harder.HERE / "weights.safetensors").read_bytes())


def kept(cache: Path, name: str) -> int:
    """How many rows of a run there are."""
    path = cache / f"{name}.json"
    return len(read_json(path)) if path.exists() else 0


def slug(*names: str) -> str:
    """A file's name."""
    return "-".join(names).replace(" ", "_").replace(",", "")


def first_rows(pipe: Any, work: Sequence[Sample], call: Mapping[str, Any]) -> Rows:
    """Of every job the prompt and d at the first row; the calls end there."""

    def stop(pipeline: Any, step: int, timestep: Any, values: dict) -> dict:
        pipeline._interrupt = True
        return values

    found: Rows = []
    for start in range(0, len(work), BATCH):
        batch = work[start : start + BATCH]
        reports = generate(pipe, batch, callback_on_step_end=stop, **call)[1]
        found += [{"prompt": j.prompt.prompt, "d_curve": r["d_curve"]} for j, r in zip(batch, reports, strict=True)]
    pipe._interrupt = False
    return found


def conditions(pipe: Any, judge: Judge, cache: Path, finished: bool = False) -> dict[str, Any]:
    """D and T under every condition, without the gate and behind it; how many ordinary images the gate catches there.

    Plain guidance and anchored first: what is interrupted has those. finished: only of what is in `cache`.
    """
    memorized = prompts("D", "test") + prompts("T", "test")
    shipped, rows = pipe.scheduler, {}
    for method in METHODS:
        for name, (scheduler, call) in CONDITIONS.items():
            work = jobs(memorized, SEEDS, policy(method))
            if finished and kept(cache, slug(name, method)) < len(work):
                continue
            pipe.scheduler = scheduler_of(shipped, scheduler)
            rows[name, method] = run(pipe, judge, slug(name, method), work, cache, **call)
    result: dict[str, Any] = {}
    for name, (scheduler, call) in CONDITIONS.items():
        pipe.scheduler = scheduler_of(shipped, scheduler)
        plain = rows[name, "cfg"]
        everyday = jobs(prompts("ordinary", "test"), SEEDS, policy("cfg"))
        if scheduler is None and "num_inference_steps" not in call:  # the same first row
            first = run(pipe, judge, slug("ordinary", "cfg"), everyday, cache)
        else:
            first = first_rows(pipe, everyday, call)
        cell: dict[str, Any] = {"memorized caught": caught(plain), "ordinary caught": caught(first)}
        for method in (method for method in METHODS if (name, method) in rows):
            own = rows[name, method]
            cell[method] = {
                f"{kind}, {gate}": describe([row for row in some if row["kind"] == kind])
                for kind in "DT"
                for gate, some in (("ungated", own), ("gated", behind(plain, own)))
            }
        result[name] = cell
    pipe.scheduler = shipped
    return result


def scheduler_of(shipped: Any, name: str | None) -> Any:
    """PNDM without its Runge-Kutta steps, as Stable Diffusion has it."""
    if name is None:
        return shipped
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    return getattr(diffusers, name).from_config(shipped.config, **more)


def ordinary(pipe: Any, judge: Judge, cache: Path) -> dict[str, Any]:
    """All ordinary test images: plain, behind the gate (really run), anchored without one; the paper's rules on those that the gate catches."""
    work = prompts("ordinary", "test")

    def made(name: str, one: Any, some: Sequence[Sample] | None = None) -> Rows:
        todo = jobs(work, SEEDS, one) if some is None else [Sample(j.prompt, j.seed, one) for j in some]
        return run(pipe, judge, slug("ordinary", name), todo, cache)

    plain = made("cfg", policy("cfg"))
    gated = made("gated", policy("anchored", gate=GATE))
    ungated = made("anchored", policy("anchored"))
    hit = [rms(row) >= GATE for row in plain]
    several = {"cfg": [row for row, is_caught in zip(plain, hit, strict=True) if is_caught]}
    chosen = [job for job, is_caught in zip(jobs(work, SEEDS), hit, strict=True) if is_caught]
    several["anchored"] = [row for row, is_caught in zip(ungated, hit, strict=True) if is_caught]
    several |= {method: made(f"caught-{method}", policy(method), chosen) for method in METHODS[2:]}
    kept = [a["hash"] == b["hash"] for a, b in zip(plain, gated, strict=True)]
    return {
        "caught": caught(plain),
        "caught by the gated policy": sum(bool(row["gate"]["caught"]) for row in gated),
        "not caught, bits kept": sum(k and not h for k, h in zip(kept, hit, strict=True)),
        "caught, as without a gate": sum(
            a["hash"] == b["hash"] for a, b, h in zip(gated, ungated, hit, strict=True) if h
        ),
        "all": {"cfg": describe(plain), "gated": describe(gated), "anchored": describe(ungated)},
        "of the caught": {name: describe(rows) for name, rows in several.items()},
        "faithfulness lost over all": {
            name: (sum(r["faithful"] for r in several["cfg"]) - sum(r["faithful"] for r in rows)) / len(plain)
            for name, rows in several.items()
        },
    }


def second(cache: Path) -> dict[str, Any]:
    """The model that memorizes harder, without a gate: D and T at scales 3 and 7.5."""
    pipe = harder.load_harder()
    judge = harder.judge(pipe)
    some = [p for kind in "DT" for p in harder.prompts(kind, "test")]
    result: dict[str, Any] = {}
    for scale in (3.0, 7.5):
        for method in METHODS:
            work, name = jobs(some, SEEDS, policy(method)), f"{method}, scale {scale:g}"
            rows = run(pipe, judge, slug("harder", name), work, cache, guidance_scale=scale)
            result[name] = {kind: describe([row for row in rows if row["kind"] == kind]) for kind in "DT"}
    return result


def test(work: Path, out: Path, finished: bool = False) -> Mapping[str, Any]:
    """Everything; rows are kept in a folder of WORK, the tables go to OUT/anchored-test.json part by part. finished: as for `conditions`."""
    cache, pipe = cache_of(work), load()
    judge = Judge(pipe)
    result: dict[str, Any] = {"gate": GATE, "seeds": SEEDS}
    for name, part in (
        ("ordinary", lambda: ordinary(pipe, judge, cache)),
        ("harder", lambda: second(cache)),
        ("conditions", lambda: conditions(pipe, judge, cache, finished)),
    ):
        result[name] = part()
        write_json(out / "anchored-test.json", result)
    return result
