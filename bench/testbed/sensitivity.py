"""How much the default's work depends on scheduler, steps, guidance scale and dtype.

D test prompts with and without the guard and 40 ordinary prompts without it. For the dtypes
the decisions are compared image by image with float32: caught by the gate or not, and the row of the transition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastguard import policy
from fastguard.testbed import load, policy_path, prompts
from fastguard.testbed.measures import Judge
from fastguard.testbed.sampling import CALL

from .run import jobs, rms, run
from .stats import over_prompts

ORDINARY = 40


def variants() -> dict[str, tuple[str | None, dict]]:
    """Name -> (scheduler class or None for the shipped one, arguments of the call)."""
    schedulers = ("DPMSolverMultistepScheduler", "PNDMScheduler", "EulerDiscreteScheduler")
    scales = (2.0, 3.0, 5.0, 7.5)
    return {
        f"DDIM, 50 steps, scale {CALL['guidance_scale']:g}": (None, {}),
        **{name.removesuffix("Scheduler"): (name, {}) for name in schedulers},
        "25 steps": (None, {"num_inference_steps": 25}),
        "100 steps": (None, {"num_inference_steps": 100}),
        **{f"scale {g:g}": (None, {"guidance_scale": g}) for g in scales if g != CALL["guidance_scale"]},
    }


def numbers(rows: list[dict], caught: bool) -> dict:
    """Copies, faithfulness of what is no copy, blow-ups; and what the gate caught. With intervals over prompts."""
    result = {
        "copies": over_prompts(rows, "copy"),
        "faithful, no copies": over_prompts([r for r in rows if not r["copy"]], "faithful"),
        "blown": over_prompts(rows, "blown"),
    }
    if caught:
        result["caught"] = over_prompts([r | {"caught": bool(r["gate"]["caught"])} for r in rows], "caught")
    return result


def flips(rows: list[dict], reference: list[dict]) -> dict:
    """Images whose decision differs from float32's: of all, and of those that both catch."""
    compared = []
    for a, b in zip(rows, reference, strict=True):
        caught = a["gate"]["caught"] and b["gate"]["caught"]
        rows_apart = abs(_transition(a) - _transition(b)) if caught else None
        compared.append(
            {
                "prompt": a["prompt"],
                "flip": a["gate"]["caught"] != b["gate"]["caught"],
                "moved": rows_apart > 0 if caught else None,
                "rows": rows_apart,
            }
        )
    return {
        "images": len(compared),
        "gate flips": over_prompts(compared, "flip"),
        "transition moved": over_prompts(compared, "moved"),
        "largest move in rows": max((c["rows"] for c in compared if c["rows"] is not None), default=0),
        "copies": over_prompts(rows, "copy"),
    }


def _transition(row: dict) -> int:
    """The row of the transition; without one, the end."""
    step = row["transition_step"]
    return int(CALL["num_inference_steps"]) if step is None else step


def sensitivity(pipe: Any, judge: Judge, cache: Path, seeds: int) -> dict:
    """All variants, then float16 and bfloat16."""
    import diffusers

    chosen, memorized = policy(policy_path()), prompts("D", "test")
    shipped, result = pipe.scheduler, {}
    for name, (scheduler, call) in variants().items():
        if scheduler is not None:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(shipped.config)
        slug = name.replace(" ", "_").replace(",", "")
        row = {}
        for guard, one in (("none", policy("cfg")), ("default", chosen)):
            rows = run(pipe, judge, f"vary-{slug}-{guard}", jobs(memorized, seeds, one), cache, **call)
            row[guard] = numbers(rows, guard == "default")
        plain = jobs(prompts("ordinary", "test")[:ORDINARY], seeds, policy("cfg"))
        ordinary = run(pipe, judge, f"vary-{slug}-ordinary", plain, cache, **call)
        would = [
            r | {"caught": rms(r) >= chosen.gate} for r in ordinary
        ]  # unguarded: what the gate compares is the same
        row["ordinary"] = numbers(ordinary, False) | {"caught": over_prompts(would, "caught")}
        result[name] = row
        pipe.scheduler = shipped
    work = jobs(memorized, seeds, chosen) + jobs(prompts("ordinary", "test")[:28], seeds, chosen)
    reference = run(pipe, judge, "dtype-float32", work, cache)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        low = load(torch_dtype=dtype)
        result[name] = flips(run(low, judge, f"dtype-{name}", work, cache), reference)
        del low
    return result
