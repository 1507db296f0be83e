"""The table and the plot of `make bench` from its JSON."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from bench.ratios import plot, read, table


def test_table_and_plot(tmp_path):
    path = tmp_path / "bench.json"
    info = [{}, {"pair": "a / b", "ratios": [0.5, 0.6, 0.4, 0.7]}, {"pair": "c / b", "ratios": [2.0, 3.0]}]
    path.write_text(json.dumps({"benchmarks": [{"extra_info": one} for one in info]}))
    found = read(path)
    lines = table(found).splitlines()[2:]
    # statistics.quantiles by its default, exclusive method: 0.4 + 0.25 * 0.1 and 0.6 + 0.75 * 0.1
    assert lines[0] == "| a / b | 0.550 (quartiles 0.425 to 0.675, 4 pairs) |"
    assert lines[1].startswith("| c / b | 2.500 ")
    plot(found, tmp_path / "bench.png")
    with Image.open(tmp_path / "bench.png") as picture:
        colours = picture.convert("L").getextrema()
    assert colours[0] < 50 < 250 < colours[1]


def test_no_ratios(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": {}}]}))
    with pytest.raises(ValueError, match=r"bench\.json"):
        read(path)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("tests", "ratios", "code"), [(0, 0, 0), (3, 0, 3), (3, 1, 3), (0, 5, 1)])
def test_a_missed_limit_does_not_hide_the_table(tmp_path, tests, ratios, code):
    shutil.copy(Path(__file__).parents[2] / "Makefile", tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$2" = pytest ] && exit {tests}\necho "the table from $3"\nexit {ratios}\n')
    python.chmod(0o755)
    (tmp_path / "setup.py").touch()
    for stamp in (".demo", ".dev"):
        (tmp_path / ".venv" / stamp).touch()
    result = subprocess.run(["make", "bench"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "the table from build/bench.json" in result.stdout.splitlines()
    assert (result.returncode == 0) is (code == 0) and (code == 0 or f"Error {code}" in result.stderr)
