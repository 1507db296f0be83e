"""`fastguard screen`: which prompts of a file a model has memorized."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard.commands.arguments import Model, PolicyName, Quiet, Scale, Scheduler, Verbose, refusing, settle


def screen(
    model: Model,
    prompts: Annotated[
        Path, typer.Argument(help="File of prompts, of the kinds that generate reads; other columns are ignored.")
    ],
    out: Annotated[Path, typer.Option(help="The list to write, .jsonl or .csv; one that is there is not overwritten.")],
    policy: PolicyName = None,
    bound: Annotated[
        float | None, typer.Option(help="Flag prompts whose mean reaches this, in place of the policy's.")
    ] = None,
    noises: Annotated[int, typer.Option(help="Noises per prompt, the same for all.")] = 4,
    seed: Annotated[int, typer.Option(help="Noise k is made from seed + k.")] = 0,
    negative_prompt: Annotated[str | None, typer.Option(help="As the images will have it.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps, as the images will have them.")] = 50,
    guidance_scale: Scale = None,
    batch_size: Annotated[int, typer.Option(help="Images per call of the pipeline, in whole prompts.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto.")] = "auto",
    device: Annotated[str, typer.Option(help="Torch device; auto: a GPU if there is one.")] = "auto",
    scheduler: Scheduler = None,
    variant: Annotated[str | None, typer.Option(help="Of the weights' files, e.g. fp16.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List prompts by RMS(c - u) at the first step, mean over a few noises, the memorized ones first. Run again to resume."""
    with refusing():
        from fastguard import checks
        from fastguard.batch.screening import Journal, distinct_prompts, statistics
        from fastguard.commands.inspection import inspect_model
        from fastguard.pipelines.loading import chosen_policy, chosen_scale, load_pipeline, prepare

        for name, value in (("noises", noises), ("steps", steps), ("batch_size", batch_size)):
            checks.integer(name, value, 1)
        if out.suffix not in (".jsonl", ".csv") or not out.parent.is_dir():
            raise ValueError(f"out={str(out)!r}: must be a .jsonl or .csv file in an existing directory")
        if out.exists():
            raise ValueError(f"out={str(out)!r}: is there already, and is not overwritten")
        found = distinct_prompts(prompts)
        chosen = chosen_policy(model, policy)
        limit = _bound(model, policy, chosen, noises) if bound is None else bound
        device, dtype = prepare(device, dtype)
        scale = chosen_scale(model, guidance_scale, chosen)
        inspect_model(model, chosen, steps=steps, guidance_scale=scale, scheduler=scheduler).check()
        settle(quiet, verbose)
        journal = Journal(
            out.with_name(f".{out.name}.part"),
            {"model": model, "noises": noises, "seed": seed, "negative_prompt": negative_prompt, "steps": steps, "guidance_scale": scale,
             "dtype": dtype, "scheduler": scheduler},
        )  # fmt: skip
        left = [prompt for prompt in found if prompt not in journal.done]
        if left:
            pipe = load_pipeline(model, dtype=dtype, device=device, scheduler=scheduler, variant=variant)
    if left:
        from tqdm import tqdm

        call: dict[str, Any] = {"num_inference_steps": steps, "negative_prompt": negative_prompt}
        call |= {} if scale is None else {"guidance_scale": scale}
        with tqdm(total=len(found), initial=len(found) - len(left), unit="prompt", disable=quiet) as bar:

            def each(prompt: str, values: list[float]) -> None:
                journal.add(prompt, values)
                bar.update()

            statistics(pipe, left, noises=noises, seed=seed, batch_size=batch_size, each=each, **call)
    lines = ranked({prompt: journal.done[prompt] for prompt in found}, limit)
    _write(out, lines)
    journal.remove()
    flagged = sum(bool(line["flagged"]) for line in lines)
    typer.echo(
        f"{len(lines)} prompts, "
        + (f"{flagged} at or above {limit:.6g}" if limit else "no bound to flag by")
        + f"\n{out}"
    )


def ranked(values: dict[str, list[float]], bound: float | None) -> list[dict[str, Any]]:
    """A line per prompt, by falling mean. flagged: whether the mean reaches the bound; None without one."""
    lines: list[dict[str, Any]] = [
        {"prompt": prompt, "mean": sum(own) / len(own), "largest": max(own), "values": own}
        for prompt, own in values.items()
    ]
    lines.sort(key=lambda line: (-line["mean"], line["prompt"]))
    return [{"flagged": None if bound is None else line["mean"] >= bound, **line} for line in lines]


def _bound(model: str, name: str | None, chosen: Any, noises: int) -> float | None:
    """The policy file's bound on the mean of so many noises (`fastguard calibrate`), else its gate, which is one for a single image."""
    from fastguard.pipelines.loading import policy_source
    from fastguard.policies.policy import SUFFIX, Policy

    source = policy_source(model, name)
    known = Policy.load(source).provenance.get("screen", {}) if str(source).endswith(SUFFIX) else {}
    if known.get("noises") == noises:
        return float(known["threshold"])
    if chosen.gate is not None:
        typer.echo(
            f"note: {source} has no bound on the mean of {noises} noises: its gate, one for a single image, is taken",
            err=True,
        )
    return chosen.gate


def _write(out: Path, lines: list[dict[str, Any]]) -> None:
    from fastguard.files import write_atomic

    if out.suffix == ".jsonl":
        write_atomic(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["flagged", "mean", "largest", "prompt"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(out, text.getvalue())
