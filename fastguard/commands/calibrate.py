"""`fastguard calibrate`: a gate from ordinary prompts, with a guarantee."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard.commands.arguments import Model, PolicyName, Quiet, Scale, Scheduler, Verbose, refusing, settle

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # components of the supported pipelines


def calibrate(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Option(
            help="File of ordinary prompts, of the kinds that generate reads. A column 'group' says which prompts are about one thing"
            " and count as one; other columns are ignored. Prompts of the same tokens are refused."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The policy file to write, .json; one that is there is not overwritten.")],
    policy: PolicyName = None,
    fpr: Annotated[float, typer.Option(help="Share of ordinary prompts (or groups) that may be caught.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="That it is no more than that.")] = 0.95,
    seeds: Annotated[int, typer.Option(help="Images per prompt; the largest counts.")] = 1,
    noises: Annotated[int, typer.Option(help="Also bound the mean over so many noises, for screen; 0: do not.")] = 4,
    negative_prompt: Annotated[str | None, typer.Option(help="As the images will have it.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own size unless given.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own size unless given.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps, as the policy will be used.")] = 50,
    guidance_scale: Scale = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the pipeline.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Torch device; auto: a GPU if there is one.")] = "auto",
    scheduler: Scheduler = None,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Choose the gate from ordinary prompts, with a guarantee on how many of them it may catch, and write a policy file."""
    with refusing():
        from fastguard import checks
        from fastguard.batch.screening import statistics
        from fastguard.commands.inspection import inspect_model
        from fastguard.pipelines.loading import chosen_policy, chosen_scale, load_pipeline, prepare
        from fastguard.policies.gate import calibrate as choose
        from fastguard.policies.gate import check_sample, collect_gate_statistics

        chosen = chosen_policy(model, policy, 1.0)  # of any height: refuses a policy that cannot have one
        found, groups = draws(prompts)
        units = (len(found), "prompts") if groups is None else (len(set(groups)), "groups of prompts")
        check_sample(units[0], fpr, confidence, f"{units[1]} in {str(prompts)!r}")
        for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size)):
            checks.integer(name, value, 1)
        checks.integer("noises", noises, 0, 1000)
        device, dtype = prepare(device, dtype)
        if out.suffix != ".json" or not out.parent.is_dir() or out.is_dir():
            raise ValueError(f"out={str(out)!r}: must be a .json file in an existing directory")
        if out.exists():
            raise ValueError(f"out={str(out)!r}: is there already, and is not overwritten")
        scale = chosen_scale(model, guidance_scale, chosen)
        inspect_model(model, chosen, steps=steps, guidance_scale=scale, scheduler=scheduler).check()
        settle(quiet, verbose)
        pipe = load_pipeline(model, dtype=dtype, device=device, scheduler=scheduler, variant=variant)
        check_tokens(pipe, found, prompts)
    given = {"guidance_scale": scale, "width": width, "height": height, "negative_prompt": negative_prompt}
    call: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    values = collect_gate_statistics(
        pipe,
        found,
        seeds=seeds,
        gate_steps=int(chosen.gate_steps),  # type: ignore[arg-type]  # lists were refused
        batch_size=batch_size,
        progress=not quiet,
        num_inference_steps=steps,
        **call,
    )
    result = choose(values, fpr, confidence, groups=groups)
    used = {
        "model": model, "steps": steps, "seeds": seeds, "dtype": dtype, "scheduler": type(pipe.scheduler).__name__,
        "negative_prompt": negative_prompt, **call,
    }  # fmt: skip
    if noises:
        each = statistics(
            pipe,
            found,
            noises=noises,
            batch_size=batch_size,
            num_inference_steps=steps,
            negative_prompt=negative_prompt,
            **call,
        )
        mean = choose([sum(own) / noises for own in each], fpr, confidence, groups=groups)
        used["screen"] = {"noises": noises, "threshold": mean.threshold, "exceeding": mean.exceeding}
    chosen_policy(model, policy, result.threshold).save(out, provenance={**result.to_dict(), **used})
    typer.echo(f"gate {result.threshold:.6g}. {result.statement}.\n{out}")


def draws(path: Path) -> tuple[list[str], list[str] | None]:
    """The prompt of every row, and the group of every row if they have one.

    A prompt is given back as it stands; a group without the spaces around it. Neither differs from another by spaces alone: that changes
    no token. ValueError if a row has no prompt, repeats one, cannot be read or has a group where others have none; OSError if the file
    cannot be read.
    """
    from fastguard.batch.prompt_files import Source
    from fastguard.batch.tables import Problem, rows

    prompts: list[str] = []
    groups: list[str] = []
    seen: dict[str, int] = {}
    unit = Source.of(path).unit
    for number, row in rows(path, None):
        where = f"prompts={str(path)!r}: {unit} {number}"
        if isinstance(row, Problem):
            raise ValueError(f"{where}: {row.message}")
        prompt, group = row.get("prompt"), row.get("group")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where}: prompt={prompt!r}: must be text that is not empty")
        if (first := seen.setdefault(_spaced(prompt), number)) != number:
            raise ValueError(f"{where} repeats {unit} {first}: it is no further draw")
        if group is not None and (not isinstance(group, str) or not group.strip()):
            raise ValueError(f"{where} has group={group!r}: must be a text")
        if prompts and (group is None) == bool(groups):
            raise ValueError(f"{where}: either every row has a group, or none")
        prompts.append(prompt)
        groups += [] if group is None else [_spaced(group)]
    if not prompts:
        raise ValueError(f"prompts={str(path)!r}: there is no prompt in it")
    return prompts, groups or None


def check_tokens(pipe: Any, prompts: list[str], path: Path) -> None:
    """ValueError if two prompts are the same to all tokenizers of the pipeline: by their case, say, or only beyond what is cut off."""
    present = [getattr(pipe, name, None) for name in TOKENIZERS]
    ids = [tokenizer(prompts, truncation=True).input_ids for tokenizer in present if tokenizer is not None]
    seen: dict[str, int] = {}
    for number, tokens in enumerate(zip(*ids, strict=True), 1):
        if (first := seen.setdefault(str(tokens), number)) != number:
            raise ValueError(
                f"prompts={str(path)!r}: prompt {number} has the tokens of prompt {first}: it is no further draw"
            )


def _spaced(text: str) -> str:
    return " ".join(text.split())
