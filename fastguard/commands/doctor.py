"""`fastguard doctor`: where a model's denoising loop waits for the device, stock and guarded. No GPU needed, no weights loaded."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from fastguard import checks
from fastguard.commands.arguments import Model, job_options, refusing, settle
from fastguard.pipelines.loading import chosen_policy, load_pipeline, skeleton


@job_options("policy", "scheduler")
@refusing()
def doctor(
    model: Model,
    steps: Annotated[int, typer.Option(help="Denoising steps of each run.")] = 4,
    gpu: Annotated[bool, typer.Option("--gpu", help="Load the model on the GPU and watch it there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    **options: Any,
) -> None:
    """List every synchronisation and host-device copy of a model's loop with its line, stock and guarded; exit 1 if the guarded has any."""
    import torch

    from fastguard import enable, find_syncs
    from fastguard.commands.inspection import inspect_model

    settle()
    checks.integer("steps", steps, 1)
    policy, scheduler = chosen_policy(model, options["policy"]), options["scheduler"]
    found = inspect_model(model, policy, steps=steps, scheduler=scheduler)
    if found["path"] == "refused":
        raise ValueError(f"model={model!r}: {found['reason']}")
    if not gpu:
        pipe = skeleton(model, scheduler=scheduler)
    elif torch.cuda.is_available():
        pipe = load_pipeline(model, dtype="float16", device="cuda", scheduler=scheduler)
    else:
        raise ValueError("gpu: torch finds none here; without --gpu the loop runs on tensors that stand for a GPU's")
    reports = [find_syncs(pipe, steps=steps)]
    # Where its gate was calibrated is of no concern here: the structure's dtype is not that of a run.
    with enable(pipe, dataclasses.replace(policy, provenance={})):
        reports.append(find_syncs(pipe, steps=steps))
    as_values = [report.to_dict() for report in reports]
    typer.echo(json.dumps(as_values, indent=2, allow_nan=False) if as_json else "\n\n".join(map(str, reports)))
    if not reports[1].free:
        raise typer.Exit(1)
