"""`fastguard inspect`: what would run on a model, and why."""

import json
from typing import Annotated, Any

import typer

from fastguard import checks
from fastguard.commands.arguments import Model, job_options, refusing, settle
from fastguard.pipelines.loading import chosen_policy, chosen_scale, facts
from fastguard.policies.provenance import elsewhere


@job_options("policy", "gate", "guidance_scale", "scheduler")
@refusing()
def inspect(
    model: Model,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's default unless given.")] = None,
    probe: Annotated[bool, typer.Option(help="Load the weights, too, and see what the pipeline's loop does.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    **options: Any,
) -> None:
    """Show what would run and why: the path, the scheduler's table, and what each step costs. Loads no weights without --probe."""
    from fastguard.commands.inspection import as_text, inspect_model, probe_model

    settle()
    if steps is not None:
        checks.integer("steps", steps, 1)
    if options["guidance_scale"] is not None:
        checks.number("guidance_scale", options["guidance_scale"], "a finite number")
    chosen = chosen_policy(model, options["policy"], options["gate"])
    scale = chosen_scale(model, options["guidance_scale"], chosen)
    found = inspect_model(model, chosen, steps=steps, guidance_scale=scale, scheduler=options["scheduler"], probe=probe)
    for told in elsewhere(chosen, {**facts(model, found["scheduler"]), "steps": found["steps"]}):
        typer.echo(f"note: {told}", err=True)
    text = as_text(found)
    if probe and found["path"] != "refused":
        looked = probe_model(found)
        found, text = found | {"probe": looked.to_dict()}, f"{text}\n\nprobe      {looked}"
    typer.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else text)
