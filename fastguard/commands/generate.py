"""`fastguard generate`: the images of prompts under a policy, each once."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard.commands.arguments import Model, Quiet, Verbose, job_options, refusing, settle

REJECTIONS = 3  # exit code: done but for what rejected.jsonl lists


@job_options()
def generate(
    model: Model,
    out: Annotated[
        Path, typer.Option(help="Directory for the images; made if missing, resumed if it holds some of them.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: .txt with one a line, or .csv, .jsonl, .parquet with the fields id, prompt,"
            " negative_prompt, seed, steps, guidance_scale, policy, width, height; what a row leaves out comes from the options."
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    **options: Any,
) -> None:
    """Make images from prompts under a policy, each once. manifest.jsonl has a line per image; run again to resume."""
    with ExitStack() as stack:
        with refusing():
            from fastguard.batch import task as batch

            settle(quiet, verbose)
            if (prompts is None) == (not prompt):
                raise ValueError("prompts: give either --prompt, once or more, or --prompts FILE")
            task = batch.prepare(model, prompts or prompt or [], out, **options)
            stack.enter_context(task.open())
        try:
            summary = task.run(progress=not quiet)
        except batch.Interrupted as stop:
            typer.echo(stop, err=True)
            raise typer.Exit(128 + stop.number) from None
        except OSError as error:
            done = "what is in the manifest is done, and the same command resumes once there is a remedy"
            typer.echo(f"error: {error}; {done}", err=True)
            raise typer.Exit(1) from None
    typer.echo(f"{summary}\n{summary.report}")
    if summary.rejected:
        raise typer.Exit(REJECTIONS)
