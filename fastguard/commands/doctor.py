"""`fastguard doctor`: where a model's denoising loop waits for the device, stock and guarded. No GPU needed, no weights loaded."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastguard import checks
from fastguard.batch.options import JobOptions
from fastguard.commands.arguments import Model, fields_of, refusing, settle
from fastguard.pipelines.loading import chosen_policy, load_pipeline, skeleton

if TYPE_CHECKING:
    from fastguard.syncs.find import SyncReport


@fields_of(JobOptions, "policy", "scheduler")
@refusing()
def doctor(
    model: Model,
    steps: Annotated[int, typer.Option(help="Denoising steps of each run.")] = 4,
    gpu: Annotated[bool, typer.Option("--gpu", help="Load the model on the GPU and watch it there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    **options: Any,
) -> None:
    """List every synchronisation and host-device copy of a model's loop with its line, stock and guarded; exit 1 if the guarded has any."""
    settle()
    reports = examine(model, steps=steps, gpu=gpu, **options)
    found = [report.to_dict() for report in reports]
    typer.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else "\n\n".join(map(str, reports)))
    if not reports[1].free:
        raise typer.Exit(1)


def examine(
    model: str, *, policy: str | None = None, steps: int = 4, scheduler: str | None = None, gpu: bool = False
) -> tuple[SyncReport, SyncReport]:
    """(stock, guarded) `find_syncs` of a text-to-image model.

    gpu  load it on the GPU; otherwise its structure runs without its weights

    ValueError for a model without a guard or of another kind, a bad policy or number of steps, or gpu=True without one.
    """
    import torch

    from fastguard import enable, find_syncs
    from fastguard.commands.inspection import inspect_model

    checks.integer("steps", steps, 1)
    chosen = chosen_policy(model, policy)
    found = inspect_model(model, chosen, steps=steps, scheduler=scheduler)
    if found["path"] == "refused":
        raise ValueError(f"model={model!r}: {found['reason']}")
    if gpu and not torch.cuda.is_available():
        raise ValueError("gpu: torch finds none here; without --gpu the loop runs on tensors that stand for a GPU's")
    on_gpu: dict[str, Any] = {"dtype": "float16", "device": "cuda"}
    pipe = load_pipeline(model, scheduler=scheduler, **on_gpu) if gpu else skeleton(model, scheduler=scheduler)
    stock = find_syncs(pipe, steps=steps)
    # Where its gate was calibrated is of no concern here: the structure's dtype is not that of a run.
    with enable(pipe, dataclasses.replace(chosen, provenance={})):
        return stock, find_syncs(pipe, steps=steps)
