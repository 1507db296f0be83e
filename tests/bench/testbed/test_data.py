"""Fetching the drawings: what is missing is said in a line, and half an archive is never trusted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.testbed import data

SOURCE = {"package": "@some/pack", "version": "1.2.3"}


def npm(folder: Path, monkeypatch, script: str) -> None:
    """An npm that runs `script` with the destination in $to."""
    folder.mkdir(exist_ok=True)
    file = folder / "npm"
    file.write_text(f'#!/bin/sh\nfor to; do :; done\necho "$*" >> "{folder}/calls"\n{script}\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_without_npm_one_line_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.testbed", "data", "--work", str(tmp_path)],
        env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: npm, the client of Node.js, is not on the PATH")


@pytest.mark.parametrize("end", ["kill -9 $$", "exit 1", "exit 0"])
def test_an_interrupted_download_is_not_trusted(monkeypatch, tmp_path, end):
    """Killed or failed with half of the file written, or done without writing it: the next call downloads again."""
    packages = tmp_path / "packages"
    name = "some-pack-1.2.3.tgz" if end != "exit 0" else "other.tgz"
    npm(tmp_path / "bin", monkeypatch, f'printf half > "$to/{name}"; echo no luck >&2; {end}')
    with pytest.raises(data.Unavailable, match=r"npm pack @some/pack@1.2.3 failed: no luck"):
        data.fetch(SOURCE, packages)
    assert list(packages.iterdir()) == []
    npm(tmp_path / "bin", monkeypatch, 'printf whole > "$to/some-pack-1.2.3.tgz"')
    for _ in range(2):
        assert data.fetch(SOURCE, packages).read_text() == "whole"
    assert list(packages.iterdir()) == [packages / "some-pack-1.2.3.tgz"]
    assert len((tmp_path / "bin" / "calls").read_text().splitlines()) == 2


def test_a_missing_renderer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(data.Unavailable, match=r"resvg-py.*diffusers-fastguard\[train\]"):
        data._iconify(None, {})
