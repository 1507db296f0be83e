"""On a normal run no other library has a word on the terminal."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_standard_error_is_empty(command):
    done = subprocess.run([sys.executable, "-m", "fastguard", command, "testbed"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr
