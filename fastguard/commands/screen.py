"""`fastguard screen`: which prompts of a file a model has memorized."""

import csv
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard import checks
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import load
from fastguard.batch.request import SEEDS
from fastguard.commands.arguments import CALL, Model, Quiet, Verbose, job_options, new_file, refusing, settle
from fastguard.files import write_atomic
from fastguard.pipelines.loading import facts
from fastguard.policies import provenance
from fastguard.policies.gate import NOISES, screening_bound
from fastguard.policies.policy import Policy

logger = logging.getLogger("fastguard")


@job_options("policy", *CALL)
@refusing()
def screen(
    model: Model,
    prompts: Annotated[
        Path,
        typer.Argument(
            help="File of prompts, of the kinds that generate reads; columns but negative_prompt are ignored."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The list to write, .jsonl or .csv; one that is there is not overwritten.")],
    bound: Annotated[
        float | None, typer.Option(help="Flag prompts whose mean reaches this, in place of the policy's bound.")
    ] = None,
    noises: Annotated[
        int | None,
        typer.Option(help="Noises per prompt, the same for all; as for the policy's bound (4) unless given."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Noise k is made from seed + k.")] = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
    **options: Any,
) -> None:
    """List prompts by RMS(c - u) at the first step, mean over a few noises, the memorized ones first. Run again to resume."""
    from tqdm import tqdm

    from fastguard.batch import screening
    from fastguard.batch.planning import plan
    from fastguard.batch.task import misfits, model_of, options_for

    settle(quiet, verbose)
    new_file(out, ".jsonl", ".csv")
    wanted = options_for(model, JobOptions(**options))
    if noises is not None:
        checks.integer("noises", noises, 1, 1000)
    if bound is not None:
        checks.number("bound", bound, "a finite number above 0", lambda mean: mean > 0)
    noises, limit = _bound(wanted.policy, noises, bound)
    checks.integer("seed", seed, 0, SEEDS - noises)
    rows, _ = load(prompts, wanted, ("prompt", "negative_prompt"))
    requests = {(request.prompt, request.negative_prompt): request for request in rows}
    settings, load_model, skeleton = model_of(model, wanted)
    for problem in misfits(skeleton, requests.values()):
        raise ValueError(problem.message)
    if bound is None:
        used = facts(model, settings["scheduler"], settings["dtype"]) | {"steps": wanted.steps}
        of_screening = filter(None, map(screening.elsewhere, requests.values()))
        for told in dict.fromkeys([*provenance.elsewhere(wanted.policy, used), *of_screening]):
            logger.warning(told)
    if not rows[0].guided:
        raise ValueError(f"guidance_scale={wanted.guidance_scale:g}: must be above 1, else there is no second branch")
    call = {"noises": noises, "seed": seed, "steps": wanted.steps, "width": wanted.width, "height": wanted.height}
    journal = screening.Journal(out.with_name(f".{out.name}.part"), settings | call)
    left = [request for key, request in requests.items() if key not in journal.done]
    if left:
        pipe = load_model()
        with tqdm(total=len(requests), initial=len(requests) - len(left), unit="prompt", disable=quiet) as bar:
            for batch in plan(left, max(1, wanted.batch_size // noises)):
                values = screening.statistics(pipe, batch, noises, seed=seed, most=wanted.batch_size)
                journal.add(zip(batch, values, strict=True))
                bar.update(len(batch))
    lines = ranked({key: journal.done[key] for key in requests}, limit)
    write_atomic(out, _text(lines, out.suffix))
    journal.remove()
    flagged = (
        "no bound to flag by" if limit is None else f"{sum(line['flagged'] for line in lines)} at or above {limit:.6g}"
    )
    typer.echo(f"{len(lines)} prompts, {flagged}\n{out}")


def ranked(values: Mapping[tuple[str, str | None], list[float]], bound: float | None) -> list[dict[str, Any]]:
    """A line per (prompt, negative prompt), by falling mean. flagged: whether the mean reaches the bound; None without one."""
    lines: list[dict[str, Any]] = []
    for (prompt, negative), own in values.items():
        mean = sum(own) / len(own)
        found = {"flagged": None if bound is None else mean >= bound, "prompt": prompt, "negative_prompt": negative}
        lines.append({**found, "mean": mean, "largest": max(own), "values": own})
    return sorted(lines, key=lambda line: (-line["mean"], line["prompt"]))


def _bound(policy: Policy, noises: int | None, bound: float | None) -> tuple[int, float | None]:
    """Noises, and the bound on the mean over them: given, the policy's (`fastguard calibrate`), or its gate, which is one for a single image."""
    known = policy.provenance.get("screen")
    if bound is not None or not (known or policy.gate):
        return noises or NOISES, bound
    own, limit = screening_bound(policy)
    noises = noises or own
    if known and noises == own:
        return own, limit
    instead = "its gate, one for a single image, is taken" if policy.gate else "nothing is flagged without --bound"
    logger.warning("the policy has no bound on the mean of %d noises: %s", noises, instead)
    return noises, policy.gate  # type: ignore[return-value]  # of one image, no list


def _text(lines: list[dict[str, Any]], ending: str) -> str:
    if ending == ".jsonl":
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["flagged", "mean", "largest", "prompt", "negative_prompt"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
