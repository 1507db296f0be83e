"""`python -m bench.testbed`: fetch the drawings, train, tune and evaluate the embedded model.

Everything is written below build/testbed unless told otherwise. What ships is copied by hand: model/, classifier.*, policy.json and
prompts.json to fastguard/testbed, the results of `anchored-test`, `evaluate`, `rules` and `tune` to docs/testbed.
"""

from __future__ import annotations

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
def evaluate(
    out: Path = RESULTS,
    work: Work = WORK,
    carry: Annotated[Path | None, typer.Option(help="numbers of an earlier version, not measured again")] = None,
) -> None:
    """Measure every preset and the gate on the test halves; tables and plots go to OUT, after `anchored-test` and `rules`. Resumable."""
    from . import evaluate as module

    module.evaluate(out, work, carry)


@app.command()
def rules(out: Path = RESULTS, work: Work = WORK) -> None:
    """Which rule detects the transition best; writes rules.json and two plots. Resumable."""
    from . import evaluate as module

    module.rules(out, work)


@app.command()
def tune(work: Work = WORK, out: Path = RESULTS) -> None:
    """Compare the paper's transitions on the tuning halves behind a calibrated gate; writes tuning.json."""
    from . import tune as module

    module.tune(work, out)


@app.command("harder")
def train_harder(
    work: Work = WORK, out: Path | None = None, processes: Annotated[int, typer.Option(min=1)] = 1
) -> None:
    """Train the second model, which memorizes harder; continues where it was interrupted."""
    from . import harder

    harder.train(work, out or harder.HERE, processes)


@app.command()
def anchored(
    out: Path = RESULTS, form: Annotated[list[str] | None, typer.Option(help="name; all unless given")] = None
) -> None:
    """Forms of anchored guidance on the tuning halves of both models; writes anchored-tuning.json."""
    from . import anchored as module

    out.mkdir(parents=True, exist_ok=True)
    module.tune(out, form)


@app.command()
def policy(out: Path = RESULTS) -> None:
    """Find the loose gate on the ordinary tuning prompts; writes policy.json."""
    from . import anchored as module

    out.mkdir(parents=True, exist_ok=True)
    print(module.write_policy(out))


@app.command()
def anchored_plot(
    results: Path = Path("docs/testbed/anchored-search.json"), out: Path = RESULTS / "anchored-tradeoff.png"
) -> None:
    """Draw what the search found."""
    from . import anchored_plot as module

    out.parent.mkdir(parents=True, exist_ok=True)
    module.plot(results, out)


@app.command()
def anchored_test(
    work: Work = WORK,
    out: Path = RESULTS,
    finished: Annotated[bool, typer.Option("--finished", help="of the conditions, only what is in WORK")] = False,
) -> None:
    """Anchored guidance and the paper's rules on the test halves of both models; writes anchored-test.json. Resumable."""
    from . import anchored_test as module

    module.test(work, out, finished)


def main() -> None:
    """Run a command; what it lacks, or cannot read or write, is one line, not a traceback."""
    from .data import Unavailable

    try:
        app()
    except (Unavailable, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
