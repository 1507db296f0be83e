"""`fastguard calibrate`: a gate from ordinary prompts, with a guarantee, and the bounds of `suspect` and of screening."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard.batch.options import JobOptions
from fastguard.commands.arguments import CALL, Model, Quiet, Verbose, fields_of, new_file, refusing, settle


@fields_of(JobOptions, "policy", *CALL)
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
    fpr: Annotated[float, typer.Option(help="Share of ordinary prompts (or groups) that each bound may catch.")] = 0.01,
    confidence: Annotated[float, typer.Option(help="That it is no more than that.")] = 0.95,
    seeds: Annotated[int, typer.Option(help="Images per prompt; the largest counts.")] = 1,
    noises: Annotated[int, typer.Option(help="Also bound the mean over so many noises, for screening; 0: do not.")] = 4,
    suspect: Annotated[
        bool, typer.Option(help="Also bound the curve's collapse: each image runs to mid-run, not only its first step.")
    ] = True,
    quiet: Quiet = False,
    verbose: Verbose = False,
    **options: Any,
) -> None:
    """Choose the gate from ordinary prompts, with a guarantee on how many of them it may catch, and write a policy file."""
    with refusing():
        from fastguard import checks
        from fastguard.batch.planning import arguments
        from fastguard.batch.request import parse
        from fastguard.batch.screening import statistics
        from fastguard.batch.task import model_of, options_for
        from fastguard.files import short
        from fastguard.pipelines.statistics import observe
        from fastguard.policies.gate import calibrate as choose
        from fastguard.policies.gate import check_sample

        settle(quiet, verbose)
        wanted = options_for(model, JobOptions(**options))
        if not wanted.policy.guarded:
            raise ValueError(
                f"policy={short(wanted.policy.name)}: can have no gate, it guards no image; calibrate one that does, e.g. 'anchored'"
            )
        found, groups = draws(prompts)
        units = (len(found), "prompts") if groups is None else (len(set(groups)), "groups of prompts")
        check_sample(units[0], fpr, confidence, f"{units[1]} in {str(prompts)!r}")
        checks.integer("seeds", seeds, 1)
        checks.integer("noises", noises, 0, 1000)
        new_file(out, ".json")
        requests = [parse({"prompt": prompt}, wanted, i)[0] for i, prompt in enumerate(found)]
        settings, load_model, limits = model_of(model, wanted)
        limits.check(requests)
        pipe = load_model()
        check_tokens(pipe, found, prompts)
        scale = requests[0].stock_scale
        call = arguments([request for request in requests for _ in range(seeds)])
        call |= {} if scale is None else {"guidance_scale": scale}
        images = list(
            observe(
                pipe,
                seeds=range(len(found) * seeds),
                gate_steps=wanted.policy.gate_steps,
                to_mid_run=suspect,
                batch_size=wanted.batch_size,
                progress=not quiet,
                **call,
            )
        )
        each = [images[i : i + seeds] for i in range(0, len(images), seeds)]
        gate = choose([max(image.gate["rms"] for image in own) for own in each], fpr, confidence, groups=groups)
        bounds: dict[str, Any] = {}
        known = gate.to_dict() | settings | {"scheduler": type(pipe.scheduler).__name__, "seeds": seeds}
        for name in CALL:
            if name not in ("batch_size", "device", *settings):
                known[name] = getattr(wanted, name)
        if suspect:  # small values are caught: their inverses are large
            inverse = [max(1 / max(image.collapse, 1e-30) for image in own) for own in each]
            found_bound = choose(inverse, fpr, confidence, groups=groups)
            bounds["suspect"] = 1 / found_bound.threshold
            known["suspect"] = {"threshold": bounds["suspect"], "exceeding": found_bound.exceeding}
        if noises:
            means = [sum(own) / noises for own in statistics(pipe, requests, noises, most=wanted.batch_size)]
            mean = choose(means, fpr, confidence, groups=groups)
            known["screen"] = {"noises": noises, "threshold": mean.threshold, "exceeding": mean.exceeding}
        dataclasses.replace(wanted.policy, gate=gate.threshold, **bounds, provenance=known).save(out)
    typer.echo(f"gate {gate.threshold:.6g}. {gate.statement}.")
    if suspect:
        typer.echo(f"suspect below {bounds['suspect']:.6g}: collapse of the curve, at the same rate")
    if noises:
        typer.echo(f"screening flags from {mean.threshold:.6g} on: mean over {noises} noises, at the same rate")
    typer.echo(out)


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
    for number, row in rows(path, ("prompt", "group"), strict=False):
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
    from fastguard.batch.cuts import TOKENIZERS

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
