"""`fastguard doctor`: where a model's denoising loop waits for the device, stock and guarded. No GPU needed, no weights loaded."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastguard.syncs.find import SyncReport


def doctor(
    model: Annotated[
        str, typer.Argument(help="Directory or hub id of a diffusers pipeline; 'testbed' is the embedded model.")
    ],
    policy: Annotated[
        str | None, typer.Option(help="Preset or .json file of the guarded run; dtp unless given.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of each run.")] = 4,
    scheduler: Annotated[str | None, typer.Option(help="Diffusers scheduler in place of the model's own.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Load the model on the GPU and watch it there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List every synchronisation and host-device copy of a model's loop with its line, stock and guarded; exit 1 if the guarded has any."""
    try:
        reports = examine(model, policy=policy, steps=steps, scheduler=scheduler, gpu=gpu)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps([report.to_dict() for report in reports], indent=2, allow_nan=False))
    else:
        typer.echo("\n\n".join(str(report) for report in reports))
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

    from fastguard import checks, enable, find_syncs
    from fastguard.commands.inspection import inspect_model
    from fastguard.pipelines.loading import load_pipeline
    from fastguard.policies.presets import DEFAULT
    from fastguard.policies.presets import policy as make_policy

    checks.integer("steps", steps, 1)
    chosen = make_policy(policy or DEFAULT)
    inspect_model(model, chosen, steps=steps, scheduler=scheduler).check()
    if gpu and not torch.cuda.is_available():
        raise ValueError("gpu: torch finds none here; without --gpu the loop runs on tensors that stand for a GPU's")
    pipe = (
        load_pipeline(model, dtype="float16", device="cuda", scheduler=scheduler)
        if gpu
        else skeleton(model, scheduler=scheduler)
    )
    stock = find_syncs(pipe, steps=steps)
    with enable(pipe, chosen):
        return stock, find_syncs(pipe, steps=steps)


def skeleton(model: str, *, scheduler: str | None = None) -> Any:
    """The pipeline with its scheduler, its denoiser and autoencoder as float16 structures without weights, and nothing else."""
    import diffusers
    import torch

    from fastguard.commands.inspection import _scheduler
    from fastguard.pipelines.loading import family_of, model_index, pipeline_class, resolve

    index = model_index(model)
    kind: Any = pipeline_class(index)
    parts: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        entry = index.get(name)
        if name == "scheduler":
            parts[name] = _scheduler(model, index, scheduler, family_of(kind))
        elif name in ("unet", "transformer", "vae", "controlnet") and isinstance(entry, (list, tuple)) and entry[1]:
            made: Any = getattr(diffusers, entry[1])
            with torch.device("meta"):
                config = made.load_config(resolve(model), subfolder=name)
                parts[name] = torch.nn.Module.to(made.from_config(config), torch.float16)
        elif name == "requires_safety_checker":
            parts[name] = False
        elif isinstance(entry, (bool, int, float, str)):
            parts[name] = entry
        elif parameter.default is inspect.Parameter.empty and name != "self":
            parts[name] = None
    return kind(**parts)
