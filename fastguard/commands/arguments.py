"""What the verbs have in common: their arguments, how bad input ends, and where log messages go."""

import dataclasses
import inspect
import logging
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fastguard.batch.options import JobOptions
from fastguard.pipelines.quiet import quiet as hush

REFUSED = 2  # exit code

Model = Annotated[
    str, typer.Argument(help="Directory or hub id of a diffusers pipeline; 'testbed' is the embedded model.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the result and errors: no progress, no other messages.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more, and let other libraries speak.")]

CALL = (
    "steps", "guidance_scale", "negative_prompt", "width", "height", "batch_size", "dtype", "device", "scheduler", "variant",
)  # fmt: skip
"""Fields of `JobOptions` for a verb that calls the pipeline as `generate` will."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turn errors in what the user gave into one line and exit code 2. Also a decorator."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(REFUSED) from None


def new_file(out: Path, *endings: str) -> None:
    """ValueError unless `out` can be written without overwriting anything."""
    if out.suffix not in endings or not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"out={str(out)!r}: must be a {' or '.join(endings)} file in an existing directory")
    if out.exists():
        raise ValueError(f"out={str(out)!r}: is there already, and is not overwritten")


def job_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes **options an option for the named fields of `JobOptions`, or all, with type, default and `help`."""
    kinds = typing.get_type_hints(JobOptions)
    fields = [field for field in dataclasses.fields(JobOptions) if field.name in names or not names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        for field in fields:
            kind = str | None if kinds[field.name] is Any else kinds[field.name]
            flag = "--" + field.name.replace("_", "-")  # given outright, it has no --no-flag beside it
            option = typer.Option(flag, help=field.metadata["help"], show_default=field.default is not False)
            has: Any = {"default": field.default, "annotation": Annotated[kind, option]}
            parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, **has))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {}  # typer would take the types from here, too
        return command

    return decorate


def settle(quiet: bool = False, verbose: bool = False) -> None:
    """Our one logger speaks on standard error, other libraries only if `verbose`: said before anything loads."""
    logger = logging.getLogger("fastguard")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.simplefilter("ignore", FutureWarning)  # other libraries' about each other; ours are of another kind
        hush()
