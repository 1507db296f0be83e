"""What the verbs have in common: their arguments, how bad input ends, and where log messages go."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

REFUSED = 2  # exit code

Model = Annotated[
    str, typer.Argument(help="Directory or hub id of a diffusers pipeline; 'testbed' is the embedded model.")
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="Preset (cfg, stp, og+stp, dtp, og+dtp, ...) or a .json file; unless given dtp, and for testbed its own.",
        show_default=False,
    ),
]
Gate = Annotated[float | None, typer.Option(help="Guard only images whose RMS(c - u) reaches this at the first steps.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's default unless given.")]
Scale = Annotated[
    float | None, typer.Option(help="Guidance scale; unless given the pipeline's default, and for testbed 3.")
]
Scheduler = Annotated[str | None, typer.Option(help="Diffusers scheduler in place of the model's own, e.g. DDIM.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors, show no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and let other libraries speak.")]


@contextmanager
def refusing() -> Iterator[None]:
    """Turn errors in what the user gave into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(REFUSED) from None


def fields_of(table: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes **options an option for every field of a dataclass, with its type, default and `help`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        hints = typing.get_type_hints(table)
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[_on_the_command_line(hints[field.name]), _described(field)],
            )
            for field in dataclasses.fields(table)
        ]
        kept = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {}  # typer would take the types from here, too
        return command

    return decorate


def _on_the_command_line(kind: Any) -> Any:
    return str | None if kind is Any else kind


def _described(field: dataclasses.Field[Any]) -> Any:
    flag = "--" + field.name.replace("_", "-")
    # A flag has no --no-flag beside it.
    return typer.Option(flag, help=field.metadata["help"], show_default=field.default is not False)


def listen(quiet: bool = False, verbose: bool = False) -> None:
    """Messages of the library's one logger, "fastguard", on standard error; other libraries' only if `verbose`."""
    logger = logging.getLogger("fastguard")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


def settle(quiet: bool = False, verbose: bool = False) -> None:
    """`listen`, and the libraries that load models say only errors: before anything loads."""
    from fastguard.pipelines import loading

    listen(quiet, verbose)
    if not verbose:
        loading.quiet()
