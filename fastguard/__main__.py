"""`python -m fastguard` is the command line."""

from fastguard.commands.cli import app

app(prog_name="fastguard")
