"""The command line. Bad input is refused before any model is loaded, with exit code 2 and the argument's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard.commands.doctor import doctor

app = typer.Typer(
    help="Memorization guard and accelerator for diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(help="Directory or hub id of a diffusers pipeline; 'testbed' is the embedded model."),
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Preset (cfg, stp, og+stp, dtp, og+dtp, ...) or a .json file; unless given dtp, and for testbed its own.",
        show_default=False,
    ),
]
Gate = Annotated[
    float | None,
    typer.Option(help="Guard only images whose RMS(c - u) reaches this at the first steps."),
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's default unless given.")]
Scale = Annotated[
    float | None, typer.Option(help="Guidance scale; unless given the pipeline's default, and for testbed 3.")
]
Scheduler = Annotated[str | None, typer.Option(help="Diffusers scheduler in place of the model's own, e.g. DDIM.")]


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors in what the user gave into exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
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
        typer.Option(help="Directory for the images; made if missing, resumed if it holds some of them."),
    ],
    policy: PolicyName = None,
    gate: Gate = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: .txt with one a line, or .csv, .jsonl, .parquet with the fields id, prompt,"
            " negative_prompt, seed, steps, guidance_scale, policy, width, height; what a row leaves out comes from the options."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the images shall not show.")] = None,
    seed: Annotated[int, typer.Option(help="Image n of a prompt is made from seed + n.")] = 0,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    guidance_scale: Scale = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size unless given.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size unless given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the pipeline; halved if memory is short.")] = 8,
    images_per_prompt: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    format: Annotated[str, typer.Option(help="png, jpeg or webp.")] = "png",
    quality: Annotated[int, typer.Option(help="Of jpeg and webp, 1 to 100.")] = 95,
    shard_size: Annotated[
        int | None, typer.Option(help="Write WebDataset shards of so many images instead of a file per image.")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave out what is bad or fails, and list it in rejected.jsonl.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(help="float32, float16 or bfloat16; auto: float16 on a GPU, else float32."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Torch device; auto: a GPU if there is one.")] = "auto",
    scheduler: Scheduler = None,
    workers: Annotated[int | None, typer.Option(help="Threads that encode and write images.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: several processes on one machine or many.")] = "local",
    actors: Annotated[int, typer.Option(help="ray: processes with a model each.")] = 1,
    cpus_per_actor: Annotated[float, typer.Option(help="ray: CPUs of each.")] = 1.0,
    gpus_per_actor: Annotated[float, typer.Option(help="ray: GPUs of each; a fraction shares one.")] = 0.0,
    ray_address: Annotated[
        str | None, typer.Option(help="ray: address of a cluster; a local one is started unless given.")
    ] = None,
) -> None:
    """Make images from prompts under a policy, each once. manifest.jsonl has a line per image; run again to resume."""
    with ExitStack() as stack:
        with _refusing():
            from fastguard.batch import generate as generation
            from fastguard.pipelines.loading import quiet

            if (prompts is None) == (not prompt):
                raise ValueError("prompts: give either --prompt, once or more, or --prompts FILE")
            chosen = _policy(policy, None, model)
            task = generation.prepare(
                model,
                prompts or prompt or [],
                out,
                policy=chosen,
                gate=gate,
                negative_prompt=negative_prompt,
                seed=seed,
                steps=steps,
                guidance_scale=_scale(guidance_scale, chosen, model),
                width=width,
                height=height,
                images_per_prompt=images_per_prompt,
                batch_size=batch_size,
                format=format,
                quality=quality,
                shard_size=shard_size,
                keep_going=keep_going,
                dtype=dtype,
                device=device,
                scheduler=scheduler,
                workers=workers,
                engine=engine,
                actors=actors,
                cpus_per_actor=cpus_per_actor,
                gpus_per_actor=gpus_per_actor,
                ray_address=ray_address,
            )
            if gate is None and chosen.gate is not None:
                _note_on_gate(policy, model, steps, scheduler)
            stack.enter_context(task.open())
        quiet()
        try:
            summary = task.run()
        except generation.Interrupted as stop:
            typer.echo(stop, err=True)
            raise typer.Exit(128 + stop.number) from None
        except OSError as error:
            typer.echo(f"error: {error}; what is in the manifest is done, and the same command resumes", err=True)
            raise typer.Exit(1) from None
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
        from fastguard.commands.inspection import inspect_model

        if steps is not None:
            checks.integer("steps", steps, 1)
        if guidance_scale is not None:
            checks.number("guidance_scale", guidance_scale, "a finite number")
        chosen = _policy(policy, gate, model)
        found = inspect_model(
            model,
            chosen,
            steps=steps,
            guidance_scale=_scale(guidance_scale, chosen, model),
            scheduler=scheduler,
        )
        if gate is None and chosen.gate is not None:
            _note_on_gate(policy, model, found.steps, scheduler)
    typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures and the page.")] = Path("demo"),
) -> None:
    """Memorized and ordinary prompts with and without the guard, on the embedded model: a page with pictures and curves."""
    with _refusing():
        from fastguard.pipelines.loading import quiet
        from fastguard.testbed.demo import run_demo

        out.mkdir(parents=True, exist_ok=True)
    quiet()
    for path in run_demo(out=out):
        typer.echo(path)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Directory or hub id of a pipeline, or 'testbed'.")],
    prompts: Annotated[
        Path,
        typer.Option(
            help='Ordinary prompts, {"prompt": "..."} a line of a .jsonl file. A "group" in every line says which prompts are about'
            " one thing and count as one. Other fields, and prompts of the same tokens, are refused."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The policy file to write, .json.")],
    policy: PolicyName = None,
    fpr: Annotated[float, typer.Option(help="Share of ordinary prompts (or groups) that may be caught.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="That it is no more than that.")] = 0.95,
    seeds: Annotated[int, typer.Option(help="Images per prompt; the largest counts.")] = 1,
    steps: Annotated[int, typer.Option(help="Denoising steps, as the policy will be used.")] = 50,
    guidance_scale: Scale = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the pipeline.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Torch device; auto: a GPU if there is one.")] = "auto",
    scheduler: Scheduler = None,
) -> None:
    """Choose the gate from ordinary prompts, with a guarantee on how many of them it may catch, and write a policy file."""
    with _refusing():
        from fastguard import checks
        from fastguard.commands.inspection import inspect_model
        from fastguard.commands.prompts import check_tokens, read_jsonl
        from fastguard.pipelines.loading import load_pipeline, prepare, quiet
        from fastguard.policies.gate import calibrate as choose
        from fastguard.policies.gate import check_sample, collect_gate_statistics

        chosen = _policy(policy, 1.0, model)  # of any height: refuses a policy that cannot have one
        found, groups = read_jsonl(prompts)
        units = (len(found), "prompts") if groups is None else (len(set(groups)), "groups of prompts")
        check_sample(units[0], fpr, confidence, f"{units[1]} in {str(prompts)!r}")
        for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size)):
            checks.integer(name, value, 1)
        device, dtype = prepare(device, dtype)
        if out.suffix != ".json" or not out.parent.is_dir() or out.is_dir():
            raise ValueError(f"out={str(out)!r}: must be a .json file in an existing directory")
        guidance_scale = _scale(guidance_scale, chosen, model)
        inspect_model(model, chosen, steps=steps, guidance_scale=guidance_scale, scheduler=scheduler).check()
    quiet()
    pipe = load_pipeline(model, dtype=dtype, device=device, scheduler=scheduler)
    with _refusing():
        check_tokens(pipe, found, prompts)
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
    result = choose(values, fpr, confidence, groups=groups)
    used = {
        "model": model,
        "steps": steps,
        "seeds": seeds,
        "dtype": dtype,
        "scheduler": type(pipe.scheduler).__name__,
    }
    _policy(policy, result.threshold, model).save(out, provenance={**result.to_dict(), **used, **scale})
    typer.echo(f"gate {result.threshold:.6g}. {result.statement}.\n{out}")


app.command()(doctor)


def _policy(name: str | None, gate: float | None, model: str) -> Any:
    """The policy of the options; without --policy the embedded model's own, or the default preset."""
    from fastguard.policies.presets import policy

    if name is not None and not name.strip():
        raise ValueError(f"policy={name!r}: is empty (an unset shell variable?); leave --policy out for the default")
    source = _source(name, model)
    return policy(source) if gate is None else policy(source, gate=gate)


def _source(name: str | None, model: str) -> str:
    """The preset or file that --policy names, or stands for when it is not given."""
    from fastguard.pipelines.loading import TESTBED
    from fastguard.policies.presets import DEFAULT

    if name is None and model == TESTBED:
        from fastguard.testbed import policy_path

        return str(policy_path()) if policy_path().exists() else DEFAULT
    return DEFAULT if name is None else name


def _note_on_gate(name: str | None, model: str, steps: int | None, scheduler: str | None) -> None:
    """Say so if the gate in a policy file was calibrated with other steps or another scheduler."""
    from fastguard.pipelines.loading import model_index
    from fastguard.policies.gate import elsewhere
    from fastguard.policies.policy import SUFFIX, provenance

    source, own = _source(name, model), model_index(model)["scheduler"][1]
    if source.endswith(SUFFIX) and (note := elsewhere(provenance(source), steps=steps, scheduler=scheduler or own)):
        typer.echo(f"note: {source}: {note}", err=True)


def _scale(given: float | None, chosen: Any, model: str) -> float | None:
    """The guidance scale of the options; without one the embedded model takes the one that its own policy was tuned at."""
    from fastguard.pipelines.loading import TESTBED

    if given is not None or model != TESTBED or chosen.guidance_scale is not None:
        return given
    from fastguard.testbed import GUIDANCE_SCALE

    return GUIDANCE_SCALE
