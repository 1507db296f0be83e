"""`python -m bench`: the paper's comparison. The other benchmarks are modules of their own: `python -m bench.NAME`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastguard.commands.cli import Scheduler

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


@app.command()
def paper(
    out: Annotated[
        Path, typer.Option(help="Folder of images, results and the page; an interrupted run goes on there.")
    ],
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the embedded model unless given.")] = None,
    prompts: Annotated[Path | None, typer.Option(help='Memorized prompts, {"caption", "index", "url"} a line.')] = None,
    ordinary: Annotated[Path | None, typer.Option(help='Ordinary prompts, {"caption"} a line, for detection.')] = None,
    train_images: Annotated[Path | None, typer.Option(help="INDEX.png, INDEX_N.png or INDEX/*.png.")] = None,
    methods: Annotated[str | None, typer.Option(help="Names with commas between them; all unless given.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of the tables; 7.5 unless given, the embedded model's own for that.")
    ] = None,
    guidance_scales: Annotated[
        str, typer.Option(help="Of the curves, with commas; '' for the tables' alone.")
    ] = "1.5,2,3,5,7.5",
    seeds: Annotated[int, typer.Option(help="Images a memorized prompt, method and scale.")] = 4,
    ordinary_seeds: Annotated[
        int, typer.Option(help="Images an ordinary prompt and method, at the tables' scale.")
    ] = 1,
    detection_seeds: Annotated[int, typer.Option(help="Images a prompt whose curve of d is looked at; 0: none.")] = 16,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Images at once; may differ when a run goes on.")] = 32,
    gate: Annotated[
        float | None, typer.Option(help="RMS(c - u) of the gated presets; the embedded model has its own.")
    ] = None,
    sscd: Annotated[
        str, typer.Option(help="'onnx', a TorchScript file, 'off', or 'auto': onnx, off on the embedded model.")
    ] = "auto",
    clip: Annotated[str | None, typer.Option(help="Folder or hub id of a CLIP model, for the CLIP score.")] = None,
    fid: Annotated[str | None, typer.Option(help="'inception' or a TorchScript file, for FID.")] = None,
    real_images: Annotated[
        Path | None, typer.Option(help="Images that FID compares with; the training images unless given.")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="On a CPU: batches made at the same time, each with its share of the cores.")
    ] = 1,
    scheduler: Scheduler = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16")] = "auto",
) -> None:
    """Images, tables, curves and one HTML page for every method on a model's memorized prompts."""
    from bench.paper.command import Request
    from bench.paper.command import paper as run
    from bench.paper.work import Amount
    from fastguard.testbed.sampling import CALL

    if guidance_scale is None:
        guidance_scale = 7.5 if model is not None else float(CALL["guidance_scale"])
    try:
        request = Request(
            out=out,
            model=model,
            prompts=prompts,
            ordinary=ordinary,
            train_images=train_images,
            methods=_names(methods),
            amount=Amount(
                guidance_scale, _numbers(guidance_scales), seeds, ordinary_seeds, detection_seeds, batch_size
            ),
            steps=steps,
            gate=gate,
            sscd=sscd,
            clip=clip,
            fid=fid,
            real_images=real_images,
            device=device,
            dtype=dtype,
            scheduler=scheduler,
            processes=processes,
            command="python -m bench " + shlex.join(sys.argv[1:]),
        )
        result = run(request)
    except (ValueError, RuntimeError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    for one in result["verdicts"].values():
        for sentence in one["sentences"]:
            typer.echo(sentence)
    typer.echo(str(out / "report.html"))


if __name__ == "__main__":
    app()
