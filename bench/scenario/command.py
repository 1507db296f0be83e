"""What `python -m bench scenario` does. Every step is kept in the folder and not done again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fastguard
from bench.paper.choose import choose
from bench.paper.command import paper
from bench.paper.request import Request
from bench.scenario import finetune
from bench.scenario.drawings import drawings, images
from bench.scenario.items import calibration, preserved
from fastguard import testbed
from fastguard.files import write_json
from fastguard.pipelines.statistics import collect_gate_statistics
from fastguard.policies.gate import calibrate

FPR = 0.05
DONE = "finetune.json"  # written last


def scenario(kind: str, request: Request) -> dict[str, Any] | None:
    """Fine-tune unless that is done, calibrate unless that is done, then `paper` on it. ValueError for bad input, before any work.

    Until there is a fine-tuned model with its policy, the arguments are checked, and a dry run done, on the model that will be fine-tuned.
    """
    if kind not in finetune.RECIPES:
        raise ValueError(f"kind={kind!r}: must be {' or '.join(map(repr, finetune.RECIPES))}")
    tuned, policy = request.out / "finetune", request.out / "policy.json"
    where = {"lora": tuned} if kind == "lora" else {"model": str(tuned)}
    before = replace(request, scenario=True, policy=testbed.policy_path())
    request = replace(before, policy=policy, **where)
    if request.dry and not policy.exists():
        first = "calibrate" if (tuned / DONE).exists() else f"fine-tune ({kind}) and calibrate"
        print(f"would {first} first: minutes")
        return paper(before)
    if not (tuned / DONE).exists():
        choose(before, testbed.load())
        pipe = testbed.load()
        captions = [one.prompt for one in drawings()]
        losses = finetune.train(pipe, kind, images(), captions, preserved(), tuned)
        recipe = vars(finetune.RECIPES[kind])
        write_json(tuned / DONE, {"kind": kind, **recipe, "seed": finetune.SEED, "loss of every 100 steps": losses})
    if not policy.exists():
        gate(request, policy)
    return paper(request)


def gate(request: Request, target: Path) -> None:
    """The shipped policy with the gate that the fine-tuned pipeline's own ordinary prompts give, as `fastguard calibrate` finds it."""
    pipe = request.load("cpu", "float32")
    call: dict[str, Any] = {"num_inference_steps": request.steps, "guidance_scale": request.amount.scale}
    values = collect_gate_statistics(pipe, calibration(), batch_size=32, progress=True, **call)
    found = calibrate(values, fpr=FPR)
    fastguard.policy(testbed.policy_path(), gate=found.threshold).save(target, provenance={"gate": found.to_dict()})
