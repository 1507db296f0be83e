"""`python -m bench.testbed anchored`: forms of anchored guidance on the TUNING halves of both models, in the plain loop.

Which form ships was chosen from these rows (docs/anchored.md). Shipped model: D 28 prompts x 2 seeds, T 2 x 2, and the 79 of 780 ordinary
images (65 things in 12 phrases) with the largest first difference, what a gate at 10% catches. The harder one: D 16 x 2, T 2 x 2.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastguard import Policy, policy
from fastguard.files import write_json
from fastguard.testbed import Prompt, load, prompts
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import CALL, Sample, generator

from . import harder
from .anchored_loop import Form, sample
from .run import jobs
from .split import TEMPLATES

BATCH = 64
CAUGHT = 0.1
FPR = 0.05  # of the bounds of screening and of suspects; 65 prompts allow no less with confidence 0.95
SEEDS = 2
OLD = {"faint": 0.0, "sharp": 0.0, "push": 0.0, "drift": "advance", "reach": None}
SCALED = {"bound": None, "reach": None}  # the strength scales what is taken out, whatever the scale
FORMS: dict[str, Form | None] = {
    "plain guidance": None,
    "1.1 g of the share": Form(faint=0, sharp=0, eta=0, reach=None),
    "rho_0 .3, feedback on advance": Form(**OLD, least=0.3, eta=0.3, allowed=0.1),
    "refreshed over 4 rows, feedback on advance": Form(
        **OLD, least=0.15, eta=0.5, allowed=0, refreshes=4, weight=1, alike=0.85
    ),
    "0.8 g of the share": Form(faint=0, sharp=0, push=-0.2, eta=0, reach=None),
    "0.8 g, refreshed over 4 rows": Form(faint=0, sharp=0, push=-0.2, eta=0, refreshes=4, weight=1, reach=None),
    "0.8 g, feedback on likeness, eta 2": Form(faint=0, sharp=0, push=-0.2, eta=2, reach=None),
    "strength .3 to .6, all scaled, eta 1": Form(**SCALED, eta=1),
    "strength .1 to .45, all scaled, eta 2": Form(**SCALED, faint=0.1, sharp=0.45, eta=2),
    "any length, eta 2": Form(eta=2, reach=None),
    "any length, eta 2, half refreshed": Form(eta=2, refreshes=4, weight=0.5, reach=None),
    "any length": Form(reach=None),
    "shipped": Form(),
}


def denoiser(pipe: Any, texts: Sequence[str]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(model input, t) -> (u, c), the prompts encoded once."""
    with torch.inference_mode():
        ids = pipe.tokenizer([*texts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = pipe.text_encoder(ids).last_hidden_state
        both = torch.cat([text[-1:].expand_as(text[:-1]), text[:-1]])

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        u, c = pipe.unet(torch.cat([x, x]), t, both).sample.chunk(2)
        return u, c

    return denoise


def noise(batch: Sequence[Sample]) -> Tensor:
    """The first latents, the same as the library's runs have."""
    return torch.cat([torch.randn((1, 8, 8, 8), generator=generator(job)) for job in batch])


def latents(pipe: Any, work: Sequence[Sample], scale: float, form: Form | None, steps: int = 50) -> Tensor:
    """Latents of all jobs under a form."""
    done = []
    for start in range(0, len(work), BATCH):
        batch = work[start : start + BATCH]
        denoise = denoiser(pipe, [job.prompt.prompt for job in batch])
        done.append(sample(denoise, pipe.scheduler, noise(batch), steps, scale, form)[0])
    return torch.cat(done)


@torch.inference_mode()
def first_differences(pipe: Any, work: Sequence[Sample]) -> Tensor:
    """RMS(c - u) at the first of 50 rows, one a job."""
    pipe.scheduler.set_timesteps(50)
    found = []
    for start in range(0, len(work), BATCH):
        batch = work[start : start + BATCH]
        u, c = denoiser(pipe, [job.prompt.prompt for job in batch])(noise(batch), pipe.scheduler.timesteps[0])
        found.append((c - u).square().flatten(1).mean(1).sqrt())
    return torch.cat(found)


def everyday(pipe: Any) -> tuple[list[Sample], Tensor]:
    """The ordinary things of the tuning half in every phrase, one image each, and their first differences."""
    work = [
        Sample(Prompt(t.format(x=p.concept), p.concept, "ordinary", "tuning", 1, None), 0)
        for p in prompts("ordinary", "tuning")
        for t in TEMPLATES
    ]
    return work, first_differences(pipe, work)


def caught(pipe: Any) -> tuple[list[Sample], float]:
    """The ordinary tuning images that a gate at 10% catches, and that gate: between the last of them and the next."""
    work, found = everyday(pipe)
    order, count = found.argsort(descending=True), int(len(work) * CAUGHT) + 1
    gate = (found[order[count - 1]] + found[order[count]]) / 2
    return [work[i] for i in order[:count]], float(gate)


def write_policy(out: Path) -> Path:
    """`policy.json` in `out`, the shipped policy: anchored behind the gate of `caught`, to four digits, and what it belongs to."""
    pipe = load()
    threshold = round(caught(pipe)[1], 4)
    work, found = everyday(pipe)
    hit = int((found >= threshold).sum())
    known = {
        "model": "testbed",
        "scheduler": type(pipe.scheduler).__name__,
        "steps": CALL["num_inference_steps"],
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "guidance_scale": CALL["guidance_scale"],
        "gate": {
            "threshold": threshold,
            "prompts": len(work),
            "caught": hit,
            "statement": f"RMS(c - u) >= {threshold:g} at the first row catches {hit} of the {len(work)} ordinary tuning images (65 things in 12 phrases, "
            "one noise each). It is loose on purpose, and bounds nothing: of other ordinary prompts it may catch more",
        },
    }
    bounds = calibrated(out)
    # Rounded away from the ordinary prompts, so that a last digit of another machine changes nothing.
    suspect = math.floor(100 * bounds.suspect) / 100  # type: ignore[operator]
    screen = bounds.provenance["screen"]
    known["screen"] = screen | {"threshold": math.ceil(1e4 * screen["threshold"]) / 1e4}
    known["bounds"] = (
        f"screen and suspect: fastguard calibrate, {FPR:.0%} of {bounds.provenance['prompts']} ordinary tuning prompts"
    )
    mine = policy("anchored", gate=threshold, suspect=suspect, name="testbed")
    return mine.save(out / "policy.json", provenance=known)


def calibrated(out: Path) -> Policy:
    """What `fastguard calibrate` says of the ordinary tuning prompts, one phrase each."""
    texts, found = out / "ordinary.txt", out / "calibrated.json"
    texts.write_text("\n".join(prompt.prompt for prompt in prompts("ordinary", "tuning")))
    found.unlink(missing_ok=True)
    command = ["calibrate", "testbed", "--policy", "anchored", "--fpr", str(FPR), "--quiet"]
    subprocess.run([sys.executable, "-m", "fastguard", *command, "--prompts", texts, "--out", found], check=True)
    return Policy.load(found)


def summary(judge: Judge, work: Sequence[Sample], z: Tensor) -> dict[str, dict[str, float | None]]:
    """By kind of prompt: shares of copies, of useful images (no copy, faithful, not blown up), faithfulness, similarity."""
    rows, kinds = judge(z, [job.prompt for job in work]), np.array([job.prompt.kind for job in work])
    result = {}
    for kind in dict.fromkeys(kinds):
        here = kinds == kind
        faithful, blown = (np.array(rows[key], float)[here] for key in ("faithful", "blown"))
        cell = {"images": int(here.sum()), "faithful": faithful.mean(), "blown": blown.mean()}
        if kind != "ordinary":
            copy, near = (np.array(rows[key], float)[here] for key in ("copy", "similarity"))
            free = faithful[copy == 0]
            cell |= {
                "copies": copy.mean(),
                "similarity": near.mean(),
                "p95": np.percentile(near, 95),
                "useful": ((copy == 0) & (faithful == 1) & (blown == 0)).mean(),
                "faithful, no copies": free.mean() if len(free) else None,
            }
        result[str(kind)] = {k: v if v is None else round(float(v), 4) for k, v in cell.items()}
    return result


def tune(out: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Every form on both tuning halves: scale 3, and 7.5 (shipped model: 15 too) for the memorized prompts. Writes anchored-tuning.json in `out`."""
    shipped, other = load(), harder.load_harder()
    memorized = jobs(prompts("D", "tuning"), SEEDS) + jobs(prompts("T", "tuning"), SEEDS)
    ordinary, gate = caught(shipped)
    second = [job for kind in "DT" for job in jobs(harder.prompts(kind, "tuning"), SEEDS)]
    models = {"shipped": (shipped, Judge(shipped)), "harder": (other, harder.judge(other))}
    result: dict[str, Any] = {"gate": gate, "forms": {}}
    for name in names or FORMS:
        cells = {}
        for model, scale, work in (
            ("shipped", 3.0, memorized + ordinary),
            ("shipped", 7.5, memorized),
            ("shipped", 15.0, memorized),
            ("harder", 3.0, second),
            ("harder", 7.5, second),
        ):
            pipe, judge = models[model]
            cells[f"{model}, scale {scale:g}"] = summary(judge, work, latents(pipe, work, scale, FORMS[name]))
            print(name, model, scale, cells[f"{model}, scale {scale:g}"], flush=True)
        result["forms"][name] = cells
        write_json(out / "anchored-tuning.json", result)
    return result
