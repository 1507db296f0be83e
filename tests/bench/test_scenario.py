"""The scenario of fine-tunes: its prompts, its training, and the guard enabled on the result as a user would."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastguard
from bench.__main__ import app
from bench.recheck.__main__ import main as recheck
from bench.scenario import finetune, items
from bench.scenario.drawings import drawings, images
from fastguard import testbed


def test_twenty_pictures_that_the_model_was_not_trained_on() -> None:
    pictures, known = images(), testbed.training_images()
    assert pictures.shape == (20, 32, 32, 3) and len({one.prompt for one in drawings()}) == 20
    apart = [np.abs(pictures[i].astype(int) - known.astype(int)).mean((1, 2, 3)).min() for i in range(20)]
    assert min(apart) > 20, "grey levels: none is one of the duplicated pictures"


def test_prompts_of_the_three_kinds_do_not_mix() -> None:
    found, calibration = items.items(), items.calibration()
    tuned = [item for item in found if item.group == "memorized"]
    test = [item.extra.concept for item in found if item.group == "ordinary"]
    shown = {item.extra.concept for item in tuned}
    assert len(tuned) == 20 and len(test) == 100 and len(calibration) == 25 * 12
    assert len(set(items.preserved())) == 20 * 6 and not set(items.preserved()) & set(calibration)
    assert not shown & set(test)
    assert not any(f" {concept} " in f" {prompt} " for prompt in calibration for concept in shown)
    assert [item.training for item in tuned] == [(k,) for k in range(20)]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_lowers_the_loss_and_what_is_kept_is_what_was_trained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finetune.RECIPES[kind]
    monkeypatch.setitem(finetune.RECIPES, kind, finetune.Recipe(12, recipe.rate, recipe.rank))
    monkeypatch.setattr(finetune, "LOG_EVERY", 4)
    pipe, captions = testbed.load(), [one.prompt for one in drawings()][:4]
    x, text, t = torch.randn(4, 8, 8, 8), pipe.encode_prompt(captions, "cpu", 1, False)[0].detach(), torch.tensor(500)
    with torch.no_grad():
        before = pipe.unet(x, t, encoder_hidden_states=text).sample
        losses = finetune.train(pipe, kind, images()[:4], captions, ["a cat", "a dog"], tmp_path)
        after = pipe.unet(x, t, encoder_hidden_states=text).sample
        fresh = testbed.load()
        if kind == "lora":
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4_000_000  # the layers alone
            fresh.load_lora_weights(tmp_path)
        else:
            fresh = type(fresh).from_pretrained(tmp_path)
        kept = fresh.unet(x, t, encoder_hidden_states=text).sample
    assert len(losses) == 3 and (after - before).abs().max() > 0.05
    torch.testing.assert_close(kept, after, rtol=0, atol=1e-4)
    assert fastguard.enable(fresh, "dtp").disable() is None


def test_arguments_are_checked_before_minutes_of_training(tmp_path: Path) -> None:
    def run(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["scenario", "lora", "--out", str(tmp_path / "out"), *options])
        return result.exit_code, result.output

    code, said = run("--methods", "policy,og+sp")
    assert code == 2 and "'og+sp' is unknown, did you mean 'og+stp'?" in said
    code, said = run("--methods", "policy", "--limit", "4", "--seeds", "1", "--detection-seeds", "0", "--dry-run")
    assert code == 0 and said.startswith("would fine-tune (lora) and calibrate first: minutes")
    assert "4 memorized and 4 ordinary prompts" in said and "policy: 16 images, at most 100 rows" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From training to the page, a few steps of each; a second run trains and makes nothing."""
    monkeypatch.setitem(finetune.RECIPES, "lora", finetune.Recipe(3, 1e-3, 4))
    options = ["--methods", "none,policy,policy-ungated", "--guidance-scales", "3", "--limit", "3", "--seeds", "1"]
    options += ["--steps", "4", "--seconds", "0", "--detection-seeds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["scenario", "lora", *options])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"fine-tuned", "ordinary"}
    policy = fastguard.policy(tmp_path / "policy.json")
    caught = {row["id"]: row["details"]["gate"]["rms"] for row in rows if row["method"] == "policy"}
    assert caught and all(
        row["details"]["gate"]["threshold"] == policy.gate for row in rows if row["method"] == "policy"
    )
    # the gate compares what the fine-tuned model itself shows under plain guidance
    first = {row["id"]: row["details"] for row in rows if row["method"] == "first-look"}
    for name, rms in caught.items():
        assert rms == pytest.approx((first[name]["d_curve"][0] / 512) ** 0.5, rel=1e-4)
    assert "Does the first conditional prediction show the picture?" in (tmp_path / "tables.md").read_text()
    assert recheck(tmp_path) == 0, "every number of the page from the rows"
    page = (tmp_path / "tables.md").read_text()
    (tmp_path / "tables.md").write_text(
        re.sub(r"(\| none \| 3 \| 1\.00 \| [^|]* \| [^|]* \| )(\d)", r"\g<1>9", page, count=1)
    )
    assert recheck(tmp_path) == 1, "a number that is not"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".jsonl", ".safetensors")}
    assert CliRunner().invoke(app, ["scenario", "lora", *options]).exit_code == 0
    assert {path: path.read_bytes() for path in before} == before
    assert CliRunner().invoke(app, ["scenario", "nothing", "--out", str(tmp_path / "x")]).exit_code == 2
