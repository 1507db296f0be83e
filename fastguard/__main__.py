"""`python -m fastguard` is the command line."""

from fastguard.cli import app

app(prog_name="fastguard")
