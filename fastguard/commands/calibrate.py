"""`fastguard calibrate`: a gate from ordinary prompts, with a guarantee, and the bounds of `suspect` and of screening."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard import checks
from fastguard.batch.cuts import TOKENIZERS
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import Problem, load, named, rows
from fastguard.batch.request import Request
from fastguard.commands.arguments import CALL, Model, Quiet, Verbose, job_options, new_file, refusing, settle
from fastguard.files import short
from fastguard.policies.gate import calibrate as choose
from fastguard.policies.gate import check_sample


@job_options("policy", *CALL)
@refusing()
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
    from fastguard.batch.planning import arguments
    from fastguard.batch.screening import statistics
    from fastguard.batch.task import misfits, model_of, options_for
    from fastguard.pipelines.statistics import early_reports

    settle(quiet, verbose)
    wanted = options_for(model, JobOptions(**options))
    if not wanted.policy.guarded:
        raise ValueError(
            f"policy={short(wanted.policy.name)}: can have no gate, it guards no image; calibrate one that does, e.g. 'anchored'"
        )
    requests, groups = draws(prompts, wanted)
    units = (len(requests), "prompts") if groups is None else (len(set(groups)), "groups of prompts")
    check_sample(units[0], fpr, confidence, f"{units[1]} in {str(prompts)!r}")
    checks.integer("seeds", seeds, 1)
    checks.integer("noises", noises, 0, 1000)
    new_file(out, ".json")
    settings, load_model, skeleton = model_of(model, wanted)
    for problem in misfits(skeleton, requests):
        raise ValueError(problem.message)
    pipe = load_model()
    check_tokens(pipe, [request.prompt for request in requests], prompts)

    repeated = [request for request in requests for _ in range(seeds)]
    call = arguments(repeated, scale=requests[0].stock_scale)
    call |= {"batch_size": wanted.batch_size, "gate_steps": wanted.policy.gate_steps, "to_mid_run": suspect}
    images = list(early_reports(pipe, seeds=range(len(requests) * seeds), progress=not quiet, **call))
    each = [images[i : i + seeds] for i in range(0, len(images), seeds)]
    bound = functools.partial(choose, fpr=fpr, confidence=confidence, groups=groups)

    gate = bound([max(image.gate["rms"] for image in own) for own in each])
    fields: dict[str, Any] = {"gate": gate.threshold}
    known = {name: getattr(wanted, name) for name in CALL if name not in ("batch_size", "device")}
    known |= gate.to_dict() | settings | {"scheduler": type(pipe.scheduler).__name__, "seeds": seeds}
    told = [f"gate {gate.threshold:.6g}. {gate.statement}."]
    if suspect:  # small values are caught: their inverses are large
        inverse = bound([max(1 / max(image.collapse, 1e-30) for image in own) for own in each])
        fields["suspect"] = 1 / inverse.threshold
        known["suspect"] = {"threshold": fields["suspect"], "exceeding": inverse.exceeding}
        told.append(f"suspect below {fields['suspect']:.6g}: collapse of the curve, at the same rate")
    if noises:
        mean = bound([sum(own) / noises for own in statistics(pipe, requests, noises, most=wanted.batch_size)])
        known["screen"] = {"noises": noises, "threshold": mean.threshold, "exceeding": mean.exceeding}
        told.append(f"screening flags from {mean.threshold:.6g} on: mean over {noises} noises, at the same rate")
    dataclasses.replace(wanted.policy, **fields, provenance=known).save(out)
    typer.echo("\n".join([*told, str(out)]))


def draws(path: Path, options: JobOptions) -> tuple[list[Request], list[str] | None]:
    """A request for every row, and the group of every row if they have one.

    Spaces alone make neither another prompt nor another group: they change no token. ValueError if a row is bad, repeats a prompt or
    has a group where others have none; OSError if the file cannot be read.
    """
    requests, _ = load(path, options, ("prompt",))
    groups = [row.get("group") for _, row in rows(path, ("prompt", "group")) if not isinstance(row, Problem)]
    _, unit = named(path)
    seen: dict[str, int | None] = {}
    for request, group in zip(requests, groups, strict=True):
        where = f"prompts={str(path)!r}: {unit} {request.line}"
        if (first := seen.setdefault(" ".join(request.prompt.split()), request.line)) != request.line:
            raise ValueError(f"{where} repeats {unit} {first}: it is no further draw")
        if group is not None and (not isinstance(group, str) or not group.strip()):
            raise ValueError(f"{where} has group={group!r}: must be a text")
        if (group is None) != (groups[0] is None):
            raise ValueError(f"{where}: either every row has a group, or none")
    return requests, None if groups[0] is None else [" ".join(str(group).split()) for group in groups]


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
