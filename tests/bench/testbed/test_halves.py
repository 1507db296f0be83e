"""The policy is chosen on the tuning halves alone, and the shipped files say the same of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.testbed import anchored, run, split, tune
from fastguard import policy, testbed

DOCS = Path(__file__).resolve().parents[3] / "docs" / "testbed"


def tuning_concepts(kind: str) -> set[str]:
    """Read from the committed file."""
    halves = json.loads((testbed.path().parent / "prompts.json").read_text())
    if kind == "ordinary":
        return {e["concept"] for e in halves["ordinary"] if e["half"] == "tuning"}
    return {e["concept"] for e in halves["memorized"] if (e["type"], e["half"]) == (kind, "tuning")}


def test_calibration_prompts_are_the_ordinary_tuning_concepts_in_every_template():
    texts, concepts = tune.calibration_prompts()
    expect = {(t.format(x=c), c) for c in tuning_concepts("ordinary") for t in split.TEMPLATES}
    assert set(zip(texts, concepts, strict=True)) == expect and len(texts) == len(expect) == 65 * 12


def test_tuning_sees_no_test_prompt(pipe, monkeypatch, tmp_path):
    """The whole of `tune`, with made-up images in place of the pipeline's: every second one looks memorized to the gate."""
    seen: dict[str, set[str]] = {}

    def generate(pipe, batch, **call):
        reports = []
        for i, job in enumerate(batch):
            assert job.prompt.half == "tuning"
            seen.setdefault(job.prompt.kind, set()).add(job.prompt.concept)
            d = 512 * (0.05 if i % 2 else 0.001) ** 2
            reports.append({"d_curve": [d] * 50, "gate": None})
        return torch.zeros(len(batch), 8, 8, 8), reports

    def judge(latents, of):
        return {key: [value] * len(of) for key, value in (("copy", False), ("faithful", True), ("blown", False))}

    def collect(pipe, texts, **call):
        seen["calibration"] = set(texts)
        return [0.02] * len(texts)

    monkeypatch.setattr(run, "generate", generate)
    monkeypatch.setattr(run, "BATCH", 10_000)
    monkeypatch.setattr(tune, "Judge", lambda pipe: judge)
    monkeypatch.setattr(tune, "load", lambda: pipe)
    monkeypatch.setattr(tune, "collect_gate_statistics", collect)
    tune.tune(tmp_path / "work", tmp_path)
    assert seen["D"] == tuning_concepts("D") and seen["ordinary"] <= tuning_concepts("ordinary")
    assert seen["calibration"] == {t.format(x=c) for c in tuning_concepts("ordinary") for t in split.TEMPLATES}
    report = json.loads((tmp_path / "tuning.json").read_text())
    assert report["caught of the D tuning images"] == 0.5
    assert report["gate"]["threshold"] == pytest.approx(0.02)


def test_the_shipped_policy_is_the_one_that_the_documents_are_about():
    shipped = policy(testbed.policy_path())
    results, tested = (json.loads((DOCS / f"{name}.json").read_text()) for name in ("results", "anchored-test"))
    known = shipped.provenance["gate"]
    assert shipped.gate == known["threshold"] == results["gate"]["threshold"] == tested["gate"]
    assert shipped == policy("anchored", gate=shipped.gate, suspect=shipped.suspect, name="testbed")
    later = {"suspect": shipped.suspect}  # a bound that came after the run; it changes no image
    assert shipped.to_dict() == results["policy"] | later
    assert known["caught"] == int(anchored.CAUGHT * known["prompts"]) + 1
    assert {name: shipped.provenance[name] for name in ("model", "scheduler", "steps", "dtype", "guidance_scale")} == {
        "model": "testbed", "scheduler": "DDIMScheduler", "steps": 50, "dtype": "float32", "guidance_scale": 3.0,
    }  # fmt: skip


def test_the_former_policy_is_the_one_that_tuning_chose():
    tuned = json.loads((DOCS / "tuning.json").read_text())
    assert tune.choose(tuned["trials"], tuned["wanted"]) == tuned["kept"]


@pytest.mark.slow
def test_the_shipped_file_is_what_its_command_writes(tmp_path):
    assert anchored.write_policy(tmp_path).read_text() == testbed.policy_path().read_text()
