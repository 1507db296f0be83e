"""`python -m bench.testbed`: what it refuses is one line, before any work."""

from __future__ import annotations

import sys

import pytest

from bench.testbed.__main__ import main


def run(monkeypatch, *arguments: object) -> object:
    """The exit status of the command, with no npm to be found: a text is what Python prints before it exits with 1."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["testbed", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.mark.parametrize(("command", "option"), [("train", "--processes")])
def test_numbers_below_one_are_refused(monkeypatch, capsys, tmp_path, command, option):
    assert run(monkeypatch, command, "--work", tmp_path / "work", "--out", tmp_path / "out", option, 0) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"Invalid value for '{option}'" in message
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("arguments", ["data --work", "train --work"])
def test_folders_that_cannot_be_made_are_named(monkeypatch, tmp_path, arguments):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "below"
    assert run(monkeypatch, *arguments.split(), folder) == f"error: [Errno 20] Not a directory: '{folder}'"


def test_the_classifier_needs_the_autoencoder(monkeypatch, tmp_path):
    said = run(monkeypatch, "classifier", "--work", tmp_path)
    assert said == f"error: no {tmp_path / 'vae.pt'}: `python -m bench.testbed train` makes it"
