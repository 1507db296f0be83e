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


@pytest.mark.slow
def test_python_says_nothing_of_other_libraries_either(tmp_path):
    """And leaves their logging as it was."""
    code = (
        "import fastguard, diffusers, transformers; from fastguard import testbed\n"
        "logs = [library.utils.logging for library in (diffusers, transformers)]\n"
        "before = [log.get_verbosity() for log in logs]\n"
        f"fastguard.generate('testbed', ['a'], {str(tmp_path / 'out')!r}, steps=2, gate=9.0, progress=False); testbed.load()\n"
        "assert [log.get_verbosity() for log in logs] == before and all(log.is_progress_bar_enabled() for log in logs)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
