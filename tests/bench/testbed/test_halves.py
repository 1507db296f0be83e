"""The policy is chosen on the tuning halves alone, and the shipped files say the same of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.testbed import run, split, tables, tune
from fastguard import policy, testbed
from fastguard.pipelines.statistics import collect_gate_statistics
from fastguard.policies.gate import calibrate
from fastguard.testbed import sampling

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
    assert policy(tmp_path / "policy.json").gate == report["gate"]["threshold"] == pytest.approx(0.02)


def test_the_shipped_policy_is_the_one_that_the_documents_are_about():
    shipped, tuned = policy(testbed.policy_path()), json.loads((DOCS / "tuning.json").read_text())
    results = json.loads((DOCS / "results.json").read_text())
    provenance = json.loads(testbed.policy_path().read_text())["provenance"]
    assert shipped.gate == tuned["gate"]["threshold"] == results["gate"]["threshold"]
    assert provenance["gate"] == tuned["gate"]
    later = {"anchored": False, "suspect": None}  # fields that came after the file
    assert shipped.to_dict() == {**later, **results["policy"]}
    assert tune.choose(tuned["trials"], tuned["wanted"]) == tuned["kept"]


def test_the_shipped_gate_is_what_calibration_finds(pipe):
    """Apples are the concept with the largest statistic; they and four others once more, each image from its own seed.

    Rounding moves the largest of them by far less than the tolerance. All 780 prompts would take a dozen seconds.
    """
    texts, concepts = tune.calibration_prompts()
    start = concepts.index("apple") - 24
    some = slice(start, start + 60)
    values = collect_gate_statistics(pipe, texts[some], seed=start, batch_size=60, **sampling.CALL)
    gate = calibrate(values, 0.5, 0.95, groups=concepts[some])  # five groups prove no more, by their largest as well
    assert (gate.groups, gate.exceeding) == (5, 0)
    assert gate.threshold == pytest.approx(policy(testbed.policy_path()).gate, rel=1e-4)


def test_the_page_is_what_its_numbers_give():
    assert (DOCS / "README.md").read_text() == tables.page(json.loads((DOCS / "results.json").read_text()))
