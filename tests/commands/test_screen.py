"""`fastguard screen`: what it measures, how it sorts and flags, and that nothing is done twice."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import fastguard
from fastguard.batch.request import Request
from fastguard.batch.screening import Journal
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import pipelines
from tests.commands.invoking import invoke, refused

ROOT = Path(__file__).parents[2]
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


def test_negative_prompts_are_of_their_rows(model, tmp_path):
    """Rows without one take the option's; a prompt under two of them is two lines, each with the value of its own call."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "list.jsonl"
    values = [
        {"prompt": "a cat"},
        {"prompt": "a cat", "negative_prompt": "red"},
        {"prompt": "a cat", "negative_prompt": "blur"},
    ]
    rows.write_text("".join(json.dumps(value) + "\n" for value in values))
    result = invoke("screen", model, rows, "--out", out, *OPTIONS, "--negative-prompt", "blur")
    assert result.exit_code == 0, result.output
    found = {line["negative_prompt"]: line["values"] for line in map(json.loads, out.read_text().splitlines())}
    assert set(found) == {"red", "blur"}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    with fastguard.enable(pipe, "cfg") as guard:
        for negative, own in found.items():
            pipe(
                ["a cat"] * 2,
                negative_prompt=[negative] * 2,
                num_inference_steps=3,
                generator=pipelines.generators([0, 1]),
            )
            np.testing.assert_allclose(own, [image.rms_curve[0] for image in guard.report], rtol=1e-4)


def test_other_settings_are_not_mixed(model, rows, tmp_path, monkeypatch):
    """What an interrupted screening left is gone on with, and by nobody who asks for something else."""
    out = tmp_path / "list.csv"
    monkeypatch.setattr(
        "fastguard.batch.screening.statistics", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert invoke("screen", model, rows, "--out", out, *OPTIONS).exit_code != 0
    for other in (("--seed", 5), ("--width", 64), ("--noises", 3), ("--steps", 2)):
        assert "holds values of other settings" in refused("screen", model, rows, "--out", out, *OPTIONS, *other)
    monkeypatch.undo()
    assert invoke("screen", model, rows, "--out", out, *OPTIONS).exit_code == 0
    with out.open(newline="") as file:
        assert {row["prompt"] for row in csv.DictReader(file)} == set(PROMPTS)


@pytest.mark.slow
def test_a_killed_screening_goes_on(model, tmp_path):
    """SIGKILL twice: each prompt's row pairs are kept once they are on the disk, and the list is that of an undisturbed run."""
    file, out, whole = tmp_path / "p.txt", tmp_path / "list.jsonl", tmp_path / "whole.jsonl"
    file.write_text("".join(f"prompt {i}\n" for i in range(300)))
    command = ["screen", model, file, *OPTIONS, "--batch-size", 4, "--out"]
    part, kept = tmp_path / ".list.jsonl.part", []
    for target in (40, 120):
        process = subprocess.Popen(
            [sys.executable, "-m", "fastguard", *map(str, command), str(out)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if part.exists() and len(part.read_bytes().splitlines()) > target:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        now = [line for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        assert now[: len(kept)] == kept
        kept = now
    assert invoke(*command, out).exit_code == 0
    assert not part.exists()
    assert invoke(*command, whole).exit_code == 0
    found, expected = (
        {line["prompt"]: line["values"] for line in map(json.loads, path.read_text().splitlines())}
        for path in (out, whole)
    )
    assert len(found) == 300 and found.keys() == expected.keys()
    for prompt, values in expected.items():
        np.testing.assert_allclose(found[prompt], values, rtol=1e-4)
    for line in map(json.loads, kept[1:]):
        assert found[line["prompt"]] == line["values"], "it was measured again"


def test_journal(tmp_path):
    path = tmp_path / "j"
    first = Journal(path, {"steps": 3})
    requests = [
        Request(id=str(i), prompt=f"prompt {i}", policy=policy("cfg"), negative_prompt="x" * (i % 2) or None)
        for i in range(1000)
    ]
    for i, request in enumerate(requests):
        first.add([(request, [float(i), 1.0])])
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(path, {"steps": 3})
    assert again.done == {(r.prompt, r.negative_prompt): [float(i), 1.0] for i, r in enumerate(requests[:-1])}
    again.add([(requests[-1], [0.5, 0.5])])
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
    assert "3 prompts, 0 at or above" in result.stdout and "no bound" not in result.stderr
    elsewhere = (*options, "--negative-prompt", "blur", "--steps", 2)
    result = invoke("screen", model, rows, "--out", tmp_path / "c.jsonl", *elsewhere)
    assert "its bound for screening was found with negative_prompt=None, not 'blur'" in result.stderr
    assert "was calibrated with steps 3, not 2" in result.stderr
    result = invoke("screen", model, rows, "--out", tmp_path / "b.jsonl", *options, "--noises", 1)
    assert f"at or above {Policy.load(file).gate:.6g}" in result.stdout
    assert "has no bound on the mean of 1 noises" in result.stderr


def test_what_is_refused(model, no_model, rows, tmp_path):
    common = ("screen", model, rows, *OPTIONS, "--out")
    assert "must be a .jsonl or .csv file" in refused(*common, tmp_path / "list.txt")
    assert "noises=0" in refused("screen", model, rows, "--out", tmp_path / "x.csv", "--noises", 0)
    for bound in ("nan", "inf", "-1", "0"):
        assert "bound=" in refused("screen", model, rows, "--out", tmp_path / "x.csv", "--bound", bound)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert "line 2: prompt=3: must be text" in refused("screen", model, bad, "--out", tmp_path / "x.csv")
    unguided = ("screen", model, rows, "--policy", "cfg", "--guidance-scale", 1, "--out", tmp_path / "x.csv")
    assert "guidance_scale=1: must be above 1" in refused(*unguided)
