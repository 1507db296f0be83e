"""On a normal run no other library has a word on the terminal."""

import subprocess
import sys

import pytest

CALL = ("--steps", "2", "--device", "cpu", "-q")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "testbed"),
        ("doctor", "testbed"),
        ("screen", "testbed", "{}/p.txt", "--bound", "1", "--out", "{}/list.csv", *CALL),
        (
            "calibrate",
            "testbed",
            "--prompts",
            "{}/p.txt",
            "--fpr",
            "0.5",
            "--confidence",
            "0.7",
            "--out",
            "{}/p.json",
            *CALL,
        ),
        ("generate", "testbed", "--prompts", "{}/p.txt", "--policy", "cfg", "--out", "{}/out", *CALL),
    ],
    ids=lambda command: command[0],
)
def test_standard_error_is_empty(command, tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\ntwo dogs\n")
    run = [sys.executable, "-m", "fastguard", *(part.format(tmp_path) for part in command)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr
