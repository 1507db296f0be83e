"""Running the command line within the test's process."""

from __future__ import annotations

from typer.testing import CliRunner

from fastguard.commands.cli import app


def invoke(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def generating(model: object, out: object, *options: object) -> tuple[object, ...]:
    """`generate` of one prompt under plain guidance."""
    return ("generate", model, "--prompt", "a cat", "--out", out, "--policy", "cfg", *options)


def refused(*args: object) -> str:
    """Standard error of a command that must be refused with exit code 2."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())  # typer wraps its own messages in a box
