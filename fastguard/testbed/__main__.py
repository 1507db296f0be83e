"""`python -m fastguard.testbed`: fetch the drawings, train, calibrate, evaluate, show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Option(help="folder for downloads and checkpoints")]
WORK = Path("build/testbed")


@app.command()
def data(work: Work = WORK) -> None:
    """Fetch the drawings through the npm client and render the training set."""
    from . import pictures

    work.mkdir(parents=True, exist_ok=True)
    print(pictures.describe(work))


@app.command()
def split() -> None:
    """Write prompts.json anew from its seed (it comes out the same)."""
    from . import split as module

    print(module.write())


@app.command()
def train(work: Work = WORK, processes: Annotated[int, typer.Option(min=1)] = 2, out: Path | None = None) -> None:
    """Train everything and write the model folder; continues where it was interrupted."""
    from . import train as module

    module.train(work, processes=processes, **({} if out is None else {"out": out}))


@app.command()
def classifier(work: Work = WORK) -> None:
    """Train the classifier that measures whether a picture shows its caption."""
    from . import classifier as module
    from . import vae

    vae.load(work)  # refuses before drawings are fetched
    print(module.train(work))


@app.command()
def evaluate(
    out: Path = Path("docs/testbed"), work: Work = WORK, seeds: Annotated[int, typer.Option(min=1)] = 4
) -> None:
    """Measure every preset on the test halves; tables and plots go to OUT. Resumable."""
    from . import evaluate as module

    module.evaluate(out, work, seeds=seeds)


@app.command()
def confirm(out: Path = Path("docs/testbed"), work: Work = WORK) -> None:
    """Measure the shipped policy on seeds and phrases that nothing else has used; writes confirmed.json. Resumable."""
    from . import confirm as module

    print(json.dumps(module.confirm(out, work), indent=1))


@app.command()
def tune(work: Work = WORK, out: Path = Path("docs/testbed")) -> None:
    """Choose the policy on the tuning halves and calibrate its gate; writes policy.json."""
    from . import tune as module

    module.tune(work, out)


@app.command()
def demo(out: Path = Path("demo")) -> None:
    """The picture grid, the curves and the table as one page."""
    from fastguard.pipelines.loading import quiet

    from . import demo as module

    quiet()
    module.run_demo(out)


def main() -> None:
    """Run a command; what it lacks, or cannot read or write, is one line, not a traceback."""
    from .data import Unavailable

    try:
        app()
    except (Unavailable, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
