"""`python -m bench`: guards against published peers. The other benchmarks are modules of their own: `python -m bench.NAME`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Benchmarks of fastguard against the published peers."""


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"--guidance-scales={text!r}: must be numbers with commas between them") from None


# What every command takes.
Out = Annotated[Path, typer.Option(help="Folder of images, results and the page; an interrupted run goes on there.")]
Methods = Annotated[str | None, typer.Option(help="Names with commas between them; all unless given.")]
Scales = Annotated[str, typer.Option(help="Of the curves, with commas; '' for the tables' alone.")]
Seeds = Annotated[int, typer.Option(help="Images a memorized prompt, method and scale.")]
Ordinary = Annotated[int, typer.Option(help="Images an ordinary prompt and method, at the tables' scale.")]
Noises = Annotated[int, typer.Option("--detection-seeds", help="Noises a prompt that detectors look at; 0: none.")]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Batch = Annotated[int, typer.Option(help="Images at once; may differ when a run goes on.")]
Limit = Annotated[int | None, typer.Option(help="At most so many prompts of each group, evenly spread.")]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Two minutes on two cores, a fine-tune not counted: 8 prompts a group, one seed, two scales, ten methods.",
    ),
]
Dry = Annotated[
    bool, typer.Option("--dry-run", help="Read and check every input, say what would be made, write nothing.")
]
Pairs = Annotated[
    int,
    typer.Option("--seconds", help="Pairs of calls, a method and plain guidance by turns, for the seconds; 0: none."),
]
Processes = Annotated[
    int, typer.Option(help="On a CPU: batches made at the same time, each with its share of the cores.")
]
QUICK = ("og+stp", "dtp", "anchored", "anchored-gated", "ren", "random-words", "han-batch", "padding-mask")
QUICK_SCALES, QUICK_PROMPTS = (3.0, 7.5), 8


def _quick(amount: Any, methods: list[str] | None, limit: int | None, file: str) -> tuple[Any, list[str], int]:
    """The amount, methods and limit of a quick run. `file`: what the policy file's method is called."""
    from bench.methods import methods as known

    some = [*(name for name in QUICK if name in known()), file, f"{file}-ungated"]
    less = replace(amount, scales=QUICK_SCALES, seeds=1, ordinary=1, detection=min(amount.detection, 1))
    typer.echo(
        "quick: about two minutes on two idle cores; a look at the page, no result: its intervals are wide", err=True
    )
    return less, methods or some, limit or QUICK_PROMPTS


def _run(work: Callable[[], dict[str, Any] | None], out: Path) -> None:
    """Do it, and end in one line whatever happens."""
    try:
        result = work()
    except KeyboardInterrupt:
        typer.echo("stopped; what is finished is kept: the same command resumes", err=True)
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if result is not None:
        for sentence in result["sentences"]:
            typer.echo(sentence)
        typer.echo(str(out / "report.html"))


@app.command()
def paper(
    out: Out,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the embedded model unless given.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA to load onto the model: a file or a folder.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='Memorized prompts, {"caption", "index", "url"} a line.')] = None,
    ordinary: Annotated[
        Path | None, typer.Option(help='Ordinary prompts, {"caption"} a line: detection, and what guards do to them.')
    ] = None,
    train_images: Annotated[Path | None, typer.Option(help="INDEX.png, INDEX_N.png or INDEX/*.png.")] = None,
    limit: Limit = None,
    methods: Methods = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of the tables; 7.5 unless given, the embedded model's own for that.")
    ] = None,
    guidance_scales: Scales = "1.5,2,3,5,7.5",
    seeds: Seeds = 4,
    ordinary_seeds: Ordinary = 1,
    detection_seeds: Noises = 16,
    steps: Steps = 50,
    batch_size: Batch = 32,
    gate: Annotated[
        float | None, typer.Option(help="RMS(c - u) of the gated presets; the policy file's unless given.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Your policy file, as method 'policy'; the embedded model has its own.")
    ] = None,
    sscd: Annotated[
        str, typer.Option(help="'onnx', a TorchScript file, 'off', or 'auto': onnx, off on the embedded model.")
    ] = "auto",
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP model, for the CLIP score.")] = None,
    fid: Annotated[str | None, typer.Option(help="'inception' or a TorchScript file, for FID.")] = None,
    real_images: Annotated[
        Path | None, typer.Option(help="Images that FID compares with; the training images unless given.")
    ] = None,
    seconds: Pairs = 3,
    processes: Processes = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Diffusers scheduler in place of the model's own, e.g. DDIM.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16")] = "auto",
    quick: Quick = False,
    dry_run: Dry = False,
) -> None:
    """Images, tables, curves and one HTML page for every method on a model's memorized prompts."""

    def work() -> dict[str, Any] | None:
        from bench.paper.command import paper as run
        from bench.paper.request import Request
        from bench.paper.work import Amount
        from fastguard.testbed.sampling import CALL

        scale = guidance_scale or (7.5 if model is not None else float(CALL["guidance_scale"]))
        amount = Amount(scale, _numbers(guidance_scales), seeds, ordinary_seeds, detection_seeds, batch_size)
        names, most = _names(methods), limit
        if quick:
            amount, names, most = _quick(amount, names, limit, "policy" if policy is not None else "embedded-policy")
        request = Request(
            out=out,
            amount=amount,
            model=model,
            lora=lora,
            prompts=prompts,
            ordinary=ordinary,
            train_images=train_images,
            limit=most,
            methods=names,
            steps=steps,
            gate=gate,
            policy=policy,
            sscd=sscd,
            clip=clip,
            fid=fid,
            real_images=real_images,
            seconds=0 if quick else seconds,
            device=device,
            dtype=dtype,
            scheduler=scheduler,
            processes=processes,
            dry=dry_run,
            command="python -m bench " + shlex.join(sys.argv[1:]),
        )
        return run(request)

    _run(work, out)


@app.command()
def scenario(
    kind: Annotated[str, typer.Argument(help="lora: a LoRA (peft); full: every weight of the UNet.")],
    out: Out,
    limit: Limit = None,
    methods: Methods = None,
    guidance_scales: Scales = "1.5,3,7.5",
    seeds: Seeds = 4,
    ordinary_seeds: Ordinary = 1,
    detection_seeds: Noises = 16,
    steps: Steps = 50,
    batch_size: Batch = 32,
    seconds: Pairs = 3,
    processes: Processes = 1,
    quick: Quick = False,
    dry_run: Dry = False,
) -> None:
    """The same for the embedded model fine-tuned on twenty pictures (minutes), the guard calibrated and enabled on it as a user would.

    For a LoRA or a fine-tuned model of your own: python -m bench paper --model ... --lora ... --prompts ... --train-images ...
    """

    def work() -> dict[str, Any] | None:
        from bench.paper.request import Request
        from bench.paper.work import Amount
        from bench.scenario.command import scenario as run
        from fastguard.testbed.sampling import CALL

        amount = Amount(
            float(CALL["guidance_scale"]),
            _numbers(guidance_scales),
            seeds,
            ordinary_seeds,
            detection_seeds,
            batch_size,
        )
        names, most = _names(methods), limit
        if quick:
            amount, names, most = _quick(amount, names, limit, "policy")
        request = Request(
            out=out,
            amount=amount,
            limit=most,
            methods=names,
            steps=steps,
            seconds=0 if quick else seconds,
            device="cpu",
            processes=processes,
            dry=dry_run,
            command="python -m bench " + shlex.join(sys.argv[1:]),
        )
        return run(kind, request)

    _run(work, out)


if __name__ == "__main__":
    app()
