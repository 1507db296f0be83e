"""The examples of docs/generate.md run as they stand, on a tiny model in the embedded one's place. (docs/ray.md: test_ray.py.)"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from fastguard.batch.options import JobOptions
from fastguard.batch.request import FIELDS
from fastguard.commands.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_generate(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastguard.pipelines.loading.resolve", lambda name: model if name == "testbed" else name)
    (table,) = examples("generate.md", "csv")
    Path("prompts.csv").write_text(table)
    command, screening = examples("generate.md", "console")
    result = CliRunner().invoke(app, shlex.split(command.removeprefix("$ fastguard ")))
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, shlex.split(screening.removeprefix("$ fastguard ")))
    assert "2 prompts" in result.output, result.output
    assert sorted(path.stem for path in Path("images").glob("*.png")) == ["plain-1", "poster-1", "poster-2"]
    assert {path.name for path in Path("images").glob("*.json*")} == {"manifest.jsonl", "report.json", "settings.json"}

    names: dict = {}
    for example in examples("generate.md", "python"):
        exec(example, names)
    printed = capsys.readouterr().out
    assert "3 images, 3 of them made now" in printed
    assert "cat-2.png cfg None None" in printed
    assert "cat-1 (32, 32) a red cat" in printed
    assert json.loads(Path("more-images/settings.json").read_text())["model"] == "testbed"


def test_pages_name_every_field_and_option():
    page = (DOCS / "generate.md").read_text()
    for field in FIELDS:
        assert f"`{field}`" in page
    for field in dataclasses.fields(JobOptions):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        shown = "" if default is None or default is False else default
        assert f"| `{flag}` | {shown} | {field.metadata['help']} |\n" in page
    for option in ("actors", "gpus-per-actor", "cpus-per-actor", "ray-address"):
        assert f"`--{option}`" in (DOCS / "ray.md").read_text()
