"""`fastguard screen`: what it measures, how it sorts and flags, and that nothing is done twice."""

from __future__ import annotations

import csv
import json

import diffusers
import numpy as np
import pytest
import torch

import fastguard
from fastguard.batch import screening
from fastguard.batch.screening import Journal, distinct_prompts
from fastguard.policies.policy import Policy
from tests import pipelines
from tests.commands.invoking import invoke, refused

PROMPTS = ["a cat", "two dogs", "a house by the sea"]
OPTIONS = ("--policy", "stp", "--steps", 3, "--noises", 2, "--guidance-scale", 4, "--device", "cpu")


@pytest.fixture
def rows(tmp_path):
    """With a column that is of no concern, and a prompt that is there twice."""
    path = tmp_path / "rows.csv"
    path.write_text("id,prompt,colour\n" + "".join(f"x,{p},red\n" for p in [*PROMPTS, PROMPTS[0]]))
    return path


def by_hand(model) -> dict[str, list[float]]:
    """One call an image, under plain guidance, from the report's first row."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    found = {}
    with fastguard.enable(pipe, "cfg") as guard:
        for prompt in PROMPTS:
            found[prompt] = []
            for seed in (0, 1):
                pipe(prompt, num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(seed))
                found[prompt].append(guard.report[0].rms_curve[0])
    return found


def test_screen(model, rows, tmp_path):
    expected = by_hand(model)
    means = {prompt: float(np.mean(values)) for prompt, values in expected.items()}
    order = sorted(PROMPTS, key=lambda prompt: -means[prompt])
    bound = (means[order[0]] + means[order[1]]) / 2
    out = tmp_path / "list.jsonl"
    result = invoke("screen", model, rows, "--out", out, "--bound", bound, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert "3 prompts, 1 at or above" in result.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == order
    assert [line["flagged"] for line in lines] == [True, False, False]
    for line in lines:
        np.testing.assert_allclose(line["values"], expected[line["prompt"]], rtol=1e-4)
        np.testing.assert_allclose(line["mean"], means[line["prompt"]], rtol=1e-4)
    assert "is not overwritten" in refused("screen", model, rows, "--out", out, *OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list.jsonl", "rows.csv"]


def test_an_interrupted_screening_goes_on(model, rows, tmp_path, monkeypatch):
    """Each prompt's row pairs run once; the list is that of a run that nothing disturbed."""
    whole, out = tmp_path / "whole.csv", tmp_path / "list.csv"
    options = (*OPTIONS, "--batch-size", 2)
    assert invoke("screen", model, rows, "--out", whole, *options).exit_code == 0
    stock, seen = screening.statistics, []

    def breaks(*args, each, **call):
        def counted(prompt, values):
            each(prompt, values)
            seen.append(prompt)
            if len(seen) == 2:
                raise KeyboardInterrupt

        return stock(*args, each=counted, **call)

    monkeypatch.setattr(screening, "statistics", breaks)
    assert invoke("screen", model, rows, "--out", out, *options).exit_code != 0
    assert not out.exists()
    other = refused("screen", model, rows, "--out", out, *options, "--seed", 5)
    assert "holds values of other settings" in other
    journal = tmp_path / ".list.csv.part"
    journal.write_bytes(journal.read_bytes() + b'{"prompt": "a ho')  # what a SIGKILL may leave
    assert invoke("screen", model, rows, "--out", out, *options).exit_code == 0
    assert seen == PROMPTS
    assert out.read_text() == whole.read_text()
    assert not journal.exists()
    with out.open(newline="") as file:
        assert {row["prompt"] for row in csv.DictReader(file)} == set(PROMPTS)


def test_journal(tmp_path):
    path = tmp_path / "j"
    first = Journal(path, {"steps": 3})
    for i in range(1000):
        first.add(f"prompt {i}", [float(i), 1.0])
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path, {"steps": 3})
    assert again.done == {f"prompt {i}": [float(i), 1.0] for i in range(999)}
    again.add("prompt 999", [0.5, 0.5])
    assert len(Journal(path, {"steps": 3}).done) == 1000
    with pytest.raises(ValueError, match="other settings"):
        Journal(path, {"steps": 4})


def test_the_bound_of_a_calibrated_policy(model, rows, tmp_path):
    """calibrate bounds the mean over as many noises by the same values that screen finds; of another number the gate stands in."""
    ordinary = tmp_path / "ordinary.txt"
    ordinary.write_text("\n".join(PROMPTS) + "\n")
    file = tmp_path / "guard.json"
    result = invoke(
        "calibrate", model, "--prompts", ordinary, "--out", file, "--fpr", 0.5, "--confidence", 0.8, *OPTIONS
    )
    assert result.exit_code == 0, result.output
    largest = max(float(np.mean(values)) for values in by_hand(model).values())
    known = Policy.load(file).provenance["screen"]
    assert known["noises"] == 2
    assert known["threshold"] == pytest.approx(largest, rel=1e-4)
    assert Policy.load(file).provenance["negative_prompt"] is None
    options = ("--steps", 3, "--guidance-scale", 4, "--device", "cpu", "--policy", file)
    result = invoke("screen", model, rows, "--out", tmp_path / "a.jsonl", *options, "--noises", 2)
    assert "3 prompts, 0 at or above" in result.stdout and "note" not in result.stderr
    result = invoke("screen", model, rows, "--out", tmp_path / "b.jsonl", *options, "--noises", 1)
    assert f"at or above {Policy.load(file).gate:.6g}" in result.stdout
    assert "has no bound on the mean of 1 noises" in result.stderr


def test_what_is_refused(model, no_model, rows, tmp_path):
    common = ("screen", model, rows, *OPTIONS, "--out")
    assert "must be a .jsonl or .csv file" in refused(*common, tmp_path / "list.txt")
    assert "noises=0" in refused("screen", model, rows, "--out", tmp_path / "x.csv", "--noises", 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert "bad.jsonl: line 2: prompt=3: must be text" in refused("screen", model, bad, "--out", tmp_path / "x.csv")
    assert distinct_prompts(["a", " a ", "b"]) == ["a", "b"]


def test_no_second_branch():
    with pytest.raises(ValueError, match=r"guidance_scale=1\.0: must be above 1"):
        screening.statistics(pipelines.sd(), ["a"], guidance_scale=1.0)
