"""`python -m bench.testbed`: fetch the drawings, train, tune and evaluate the embedded model.

Everything is written below build/testbed unless told otherwise. What ships is copied by hand: model/, classifier.*, policy.json and
prompts.json to fastguard/testbed, the results of `evaluate`, `confirm` and `tune` to docs/testbed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Option(help="folder for downloads and checkpoints")]
WORK = Path("build/testbed")
RESULTS = WORK / "results"


@app.command()
def data(work: Work = WORK) -> None:
    """Fetch the drawings through the npm client and render the training set."""
    from . import pictures

    work.mkdir(parents=True, exist_ok=True)
    print(pictures.describe(work))


@app.command()
def split(out: Path = RESULTS / "prompts.json") -> None:
    """Write prompts.json anew from its seed (it comes out the same)."""
    from . import split as module

    print(module.write(out))


@app.command()
def train(work: Work = WORK, processes: Annotated[int, typer.Option(min=1)] = 2, out: Path = WORK / "model") -> None:
    """Train everything and write the model folder; continues where it was interrupted."""
    from . import train as module

    module.train(work, out, processes)


@app.command()
def classifier(work: Work = WORK, out: Path = RESULTS) -> None:
    """Train the classifier that measures whether a picture shows its caption."""
    from . import train_classifier as module
    from . import vae

    vae.load(work)  # refuses before drawings are fetched
    out.mkdir(parents=True, exist_ok=True)
    print(module.train(work, out))


@app.command()
def evaluate(out: Path = RESULTS, work: Work = WORK, seeds: Annotated[int, typer.Option(min=1)] = 4) -> None:
    """Measure every preset on the test halves; tables and plots go to OUT. Resumable."""
    from . import evaluate as module

    module.evaluate(out, work, seeds=seeds)


@app.command()
def confirm(out: Path = RESULTS, work: Work = WORK) -> None:
    """Measure the shipped policy on seeds and phrases that nothing else has used; writes confirmed.json. Resumable."""
    from . import confirm as module

    print(json.dumps(module.confirm(out, work), indent=1))


@app.command()
def tune(work: Work = WORK, out: Path = RESULTS) -> None:
    """Choose the policy on the tuning halves and calibrate its gate; writes policy.json and tuning.json."""
    from . import tune as module

    module.tune(work, out)


@app.command("harder")
def train_harder(work: Work = WORK, out: Path | None = None) -> None:
    """Train the second model, which memorizes harder, on from the shipped one; continues where it was interrupted."""
    from . import harder

    harder.train(work, out or harder.HERE)


@app.command()
def anchored(
    out: Path = RESULTS, form: Annotated[list[str] | None, typer.Option(help="name; all unless given")] = None
) -> None:
    """Forms of anchored guidance on the tuning halves of both models; writes anchored-tuning.json."""
    from . import anchored as module

    module.tune(out, form)


@app.command()
def anchored_plot(
    results: Path = Path("docs/testbed/anchored-search.json"), out: Path = RESULTS / "anchored-tradeoff.png"
) -> None:
    """Draw what the search found."""
    from . import anchored_plot as module

    out.parent.mkdir(parents=True, exist_ok=True)
    module.plot(results, out)


@app.command()
def anchored_test(work: Work = WORK, out: Path = RESULTS) -> None:
    """Anchored guidance and the paper's rules on the test halves of both models; writes anchored-test.json. Resumable."""
    from . import anchored_test as module

    module.test(work, out)


def main() -> None:
    """Run a command; what it lacks, or cannot read or write, is one line, not a traceback."""
    from .data import Unavailable

    try:
        app()
    except (Unavailable, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
