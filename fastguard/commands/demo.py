"""`fastguard demo`: the guard on the embedded model, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastguard import checks
from fastguard.commands.arguments import refusing, settle


@refusing()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for the pictures and the page.")] = Path("demo"),
) -> None:
    """Memorized and ordinary prompts with and without the guard, on the embedded model: a page with pictures and curves."""
    checks.extra("matplotlib", "plot", "demo")
    from fastguard.testbed.demo import run_demo

    settle()
    for path in run_demo(out=out):
        typer.echo(path)
