"""`python -m bench.testbed anchored-test`: the TEST halves of both models, once, by the protocol of docs/anchored.md.

An image of a gated row is the guarded one where its first difference reaches the gate, and plain guidance's elsewhere: the gate looks at the first
row alone and what it does not catch keeps its bits, so both were generated already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastguard.files import read_json, write_json
from fastguard.testbed import load, prompts
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import Sample, generate

from . import harder
from .anchored import FORMS, first_differences, latents
from .run import jobs
from .stats import over_prompts, spread

SEEDS = 4
GATE = 0.0296  # catches 10% of the ordinary tuning images: `anchored.caught`
BASELINES = ("og+dtp", "dtp", "stp")
BATCH = 32
Rows = list[dict[str, Any]]


def measured(pipe: Any, judge: Judge, work: Sequence[Sample], method: str, scale: float) -> Rows:
    """A row per image: prompt, kind, seed and the fixed measures. method: "plain", "anchored" (the loop's) or a preset of the library."""
    rows: Rows = []
    for start in range(0, len(work), BATCH):
        batch = work[start : start + BATCH]
        if method in BASELINES:
            z = generate(pipe, [Sample(j.prompt, j.seed, method) for j in batch], guidance_scale=scale)[0]
        else:
            z = latents(pipe, batch, scale, None if method == "plain" else FORMS["shipped"])
        found = judge(z, [job.prompt for job in batch])
        for i, job in enumerate(batch):
            one = {key: values[i] for key, values in found.items()}
            bad = one["copy"] or one["blown"] or not one["faithful"]
            rows.append(
                {"prompt": job.prompt.prompt, "kind": job.prompt.kind, "seed": job.seed, **one, "useful": not bad}
            )
    return rows


def describe(rows: Rows) -> dict[str, Any]:
    """The columns of the table with intervals over prompts."""
    free = [row for row in rows if not row["copy"]]
    result = {"images": len(rows), "faithful, no copies": over_prompts(free, "faithful")}
    result |= {key: over_prompts(rows, key) for key in ("copy", "useful", "blown")}
    if rows and rows[0]["copy"] is not None:
        result["similarity"] = spread(rows, "similarity")
    return result


class Kept:
    """Finished rows in one JSON file, so that an interrupted run goes on."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, read_json(path) if path.exists() else {}

    def __call__(self, name: str, pipe: Any, judge: Judge, work: Sequence[Sample], method: str, scale: float) -> Rows:
        """`measured`, unless it was."""
        if name not in self.rows:
            self.rows[name] = measured(pipe, judge, work, method, scale)
            write_json(self.path, self.rows)
            print(name, {k: describe([r for r in self.rows[name] if r["kind"] == k]) for k in "DT"}, flush=True)
        return self.rows[name]


def shipped_model(kept: Kept, methods: Sequence[str]) -> dict[str, Any]:
    """Scale 3: D and T, and the ordinary images that the gate catches; the others are plain guidance's to the bit."""
    pipe = load()
    judge = Judge(pipe)
    memorized = jobs(prompts("D", "test"), SEEDS) + jobs(prompts("T", "test"), SEEDS)
    everyday = jobs(prompts("ordinary", "test"), SEEDS)
    first, others = first_differences(pipe, memorized).tolist(), first_differences(pipe, everyday).tolist()
    hit = [job for job, value in zip(everyday, others, strict=True) if value >= GATE]
    result: dict[str, Any] = {"memorized caught": sum(v >= GATE for v in first) / len(first)}
    result["ordinary caught"] = {"images": len(hit), "of": len(everyday)}
    missed = [job for job, value in zip(memorized, first, strict=True) if value < GATE]
    plain = {(r["prompt"], r["seed"]): r for r in kept("shipped plain, missed", pipe, judge, missed, "plain", 3.0)}
    plain_hit = kept("shipped plain, ordinary caught", pipe, judge, hit, "plain", 3.0)
    result["plain"] = {"ordinary caught": describe(plain_hit)}
    for method in methods:
        rows = kept(f"shipped {method}", pipe, judge, memorized, method, 3.0)
        behind = [plain.get((row["prompt"], row["seed"]), row) for row in rows]
        touched = kept(f"shipped {method}, ordinary caught", pipe, judge, hit, method, 3.0)
        lost = (sum(r["faithful"] for r in plain_hit) - sum(r["faithful"] for r in touched)) / len(everyday)
        cells = {
            f"{kind}, {name}": describe([r for r in some if r["kind"] == kind])
            for kind in "DT"
            for name, some in (("ungated", rows), ("gated", behind))
        }
        result[method] = cells | {"ordinary caught": describe(touched), "faithfulness lost over all": lost}
    return result


def second_model(kept: Kept, methods: Sequence[str], scales: Sequence[float]) -> dict[str, Any]:
    """Without a gate, D and T."""
    pipe = harder.load_harder()
    judge = harder.judge(pipe)
    work = [job for kind in "DT" for job in jobs(harder.prompts(kind, "test"), SEEDS)]
    result: dict[str, Any] = {}
    for scale in scales:
        for method in ("plain", *methods):
            rows = kept(f"harder {method}, scale {scale:g}", pipe, judge, work, method, scale)
            cells = {kind: describe([r for r in rows if r["kind"] == kind]) for kind in "DT"}
            result[f"{method}, scale {scale:g}"] = cells
    return result


def test(work: Path, out: Path, methods: Sequence[str] = ("anchored", *BASELINES)) -> Mapping[str, Any]:
    """Everything; rows are kept in WORK, the table goes to OUT/anchored-test.json after each model."""
    work.mkdir(parents=True, exist_ok=True)
    kept = Kept(work / "anchored-rows.json")
    result: dict[str, Any] = {"gate": GATE, "seeds": SEEDS, "shipped": shipped_model(kept, methods)}
    write_json(out / "anchored-test.json", result)
    result["harder"] = second_model(kept, methods, (3.0, 7.5))
    write_json(out / "anchored-test.json", result)
    return result
