"""The command line. Bad input is refused before any model is loaded, with exit code 2 and the argument's name."""

from pathlib import Path
from typing import Annotated

import typer

from fastguard import checks
from fastguard.commands.arguments import refusing, settle
from fastguard.commands.calibrate import calibrate
from fastguard.commands.doctor import doctor
from fastguard.commands.generate import generate
from fastguard.commands.inspect import inspect
from fastguard.commands.screen import screen

app = typer.Typer(
    help="Memorization guard and accelerator for diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


@refusing()
def demo(out: Annotated[Path, typer.Option(help="Directory for the pictures and the page.")] = Path("demo")) -> None:
    """Memorized and ordinary prompts with and without the guard, on the embedded model: a page with pictures and curves."""
    checks.extra("matplotlib", "plot", "demo")
    from fastguard.testbed.demo import run_demo

    settle()
    for path in run_demo(out=out):
        typer.echo(path)


for verb in (generate, inspect, calibrate, screen, demo, doctor):
    app.command()(verb)
