"""The command line. Bad input is refused before any model is loaded, with exit code 2 and the argument's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Memorization guard and accelerator for diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        help="Directory or hub id of a diffusers pipeline; 'testbed' is the embedded model."
    ),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Preset (cfg, stp, og+stp, dtp, og+dtp, ...) or a .json file; unless given og+dtp, and for"
        " testbed its own.",
        show_default=False,
    ),
]
Gate = Annotated[
    float | None,
    typer.Option(help="Guard only images whose RMS(c - u) reaches this at the first steps."),
]
Steps = Annotated[
    int | None, typer.Option(help="Denoising steps; the pipeline's default unless given.")
]
Scale = Annotated[
    float | None, typer.Option(help="Guidance scale; the pipeline's default unless given.")
]
Scheduler = Annotated[
    str | None, typer.Option(help="Diffusers scheduler in place of the model's own, e.g. DDIM.")
]


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors in what the user gave into exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = (
            f"{error.strerror}: {error.filename}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2) from None


def _version(value: bool) -> None:
    if value:
        from fastguard import __version__

        typer.echo(f"fastguard {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def generate(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            help="Directory for the images; made if missing, resumed if it holds some of them."
        ),
    ],
    policy: PolicyName = None,
    gate: Gate = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="For all images.")] = None,
    seed: Annotated[int, typer.Option(help="Image n of a prompt is made from seed + n.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Scale = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the pipeline.")] = 1,
    images_per_prompt: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    dtype: Annotated[
        str,
        typer.Option(help="float32, float16 or bfloat16; auto: float16 on a GPU, else float32."),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Torch device; auto: a GPU if there is one.")
    ] = "auto",
    scheduler: Scheduler = None,
) -> None:
    """Make images from prompts under a policy; what was done is in the PNG's text and in report.json. Run again to resume."""
    with ExitStack() as stack:
        with _refusing():
            from fastguard import generate as generation
            from fastguard.inspection import inspect_model
            from fastguard.models import prepare, quiet, scheduler_class
            from fastguard.prompts import read_lines

            device, dtype = prepare(device, dtype)
            job = generation.Job(
                model=model,
                policy=_policy(policy, gate, model),
                prompts=(*(prompt or ()), *(read_lines(prompts) if prompts else ())),
                out=out,
                negative_prompt=negative_prompt,
                seed=seed,
                steps=steps,
                guidance_scale=guidance_scale,
                images_per_prompt=images_per_prompt,
                batch_size=batch_size,
                dtype=dtype,
                scheduler=None if scheduler is None else scheduler_class(scheduler).__name__,
                device=device,
            )
            inspect_model(
                model, job.policy, steps=steps, guidance_scale=guidance_scale, scheduler=scheduler
            ).check()
            stack.enter_context(generation.claim(job))
        quiet()
        try:
            summary = generation.run(job)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command resumes", err=True)
            raise typer.Exit(130) from None
    typer.echo(f"{summary}\n{summary.report}")


@app.command()
def inspect(
    model: Model,
    policy: PolicyName = None,
    gate: Gate = None,
    steps: Steps = None,
    guidance_scale: Scale = None,
    scheduler: Scheduler = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what would run and why: the path, the scheduler's table, and what each step costs. Loads no weights."""
    with _refusing():
        from fastguard import checks
        from fastguard.inspection import inspect_model

        if steps is not None:
            checks.integer("steps", steps, 1)
        if guidance_scale is not None:
            checks.number("guidance_scale", guidance_scale, "a finite number")
        found = inspect_model(
            model,
            _policy(policy, gate, model),
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
        )
    typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures and the page.")] = Path(
        "demo"
    ),
) -> None:
    """Memorized and ordinary prompts with and without the guard, on the embedded model: a page with pictures and curves."""
    with _refusing():
        from fastguard.testbed.demo import run_demo

        out.mkdir(parents=True, exist_ok=True)
    for path in run_demo(out=out):
        typer.echo(path)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Directory or hub id of a pipeline, or 'testbed'.")],
    prompts: Annotated[
        Path, typer.Option(help='Ordinary prompts: a .jsonl file of {"prompt": "..."}.')
    ],
    out: Annotated[Path, typer.Option(help="The policy file to write, .json.")],
    policy: PolicyName = None,
    fpr: Annotated[
        float, typer.Option(help="Share of ordinary prompts that may be caught.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="That it is no more than that.")] = 0.95,
    seeds: Annotated[int, typer.Option(help="Images per prompt; the largest counts.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps, as the policy will be used.")] = 50,
    guidance_scale: Scale = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the pipeline.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto.")] = "auto",
    device: Annotated[
        str, typer.Option(help="Torch device; auto: a GPU if there is one.")
    ] = "auto",
    scheduler: Scheduler = None,
) -> None:
    """Choose the gate from ordinary prompts, with a guarantee on how many of them it may catch, and write a policy file."""
    with _refusing():
        from fastguard import checks
        from fastguard.calibrate import calibrate as choose
        from fastguard.calibrate import collect_gate_statistics, needed_prompts
        from fastguard.inspection import inspect_model
        from fastguard.models import load_pipeline, prepare, quiet
        from fastguard.prompts import read_jsonl

        chosen = _policy(policy, 1.0, model)  # of any height: refuses a policy that cannot have one
        needed, found = needed_prompts(fpr, confidence), read_jsonl(prompts)
        if len(found) < needed:
            raise ValueError(
                f"prompts={str(prompts)!r}: holds {len(found)}, but fpr={fpr:g} at confidence={confidence:g} needs at"
                f" least {needed}"
            )
        for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size)):
            checks.integer(name, value, 1)
        device, dtype = prepare(device, dtype)
        if out.suffix != ".json" or not out.parent.is_dir():
            raise ValueError(f"out={str(out)!r}: must be a .json file in an existing directory")
        inspect_model(
            model, chosen, steps=steps, guidance_scale=guidance_scale, scheduler=scheduler
        ).check()
    quiet()
    pipe = load_pipeline(model, dtype=dtype, device=device, scheduler=scheduler)
    scale: dict[str, Any] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    values = collect_gate_statistics(
        pipe,
        found,
        seeds=seeds,
        gate_steps=chosen.gate_steps,
        batch_size=batch_size,
        progress=True,
        num_inference_steps=steps,
        **scale,
    )
    result = choose(values, fpr, confidence)
    used = {
        "model": model,
        "steps": steps,
        "seeds": seeds,
        "dtype": dtype,
        "scheduler": type(pipe.scheduler).__name__,
    }
    _policy(policy, result.threshold, model).save(
        out, provenance={**result.to_dict(), **used, **scale}
    )
    typer.echo(f"gate {result.threshold:.6g}. {result.statement}.\n{out}")


def _policy(name: str | None, gate: float | None, model: str) -> Any:
    """The policy of the options; without --policy the embedded model's own, or the default preset."""
    from fastguard.models import TESTBED
    from fastguard.policy import DEFAULT, policy

    source: str | Path = name or DEFAULT
    if name is None and model == TESTBED:
        from fastguard.testbed import policy_path

        source = policy_path() if policy_path().exists() else DEFAULT
    return policy(source) if gate is None else policy(source, gate=gate)
