"""Tests that need Triton's interpreter: TRITON_INTERPRET must be set before triton is imported, so they get a process of their own."""

import os
import subprocess
import sys

HERE = os.environ.get("TRITON_INTERPRET") == "1"


def run_file(path: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
