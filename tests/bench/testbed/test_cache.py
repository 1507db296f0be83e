"""What is taken from a cache is what was asked for, of the same weights."""

from __future__ import annotations

import json

import pytest

from bench.testbed import baselines, tune
from bench.testbed import run as module
from bench.testbed.run import jobs, run
from fastguard.testbed import classifier, prompts


@pytest.fixture
def made(monkeypatch):
    """Rows without a pipeline; counts what is generated."""
    import torch

    count = []

    def generate(pipe, batch, **call):
        count.extend((job.prompt.prompt, job.seed) for job in batch)
        return torch.zeros(len(batch), 8, 8, 8), [{} for _ in batch]

    monkeypatch.setattr(module, "generate", generate)
    return count


def judge(latents, some):
    return {"copy": [False] * len(some)}


def test_cached_rows_are_those_of_the_jobs(made, tmp_path):
    some = prompts("D", "tuning")[:3]
    first = run(None, judge, "x", jobs(some, 2), tmp_path)
    assert run(None, judge, "x", jobs(some, 2), tmp_path) == first and len(made) == 6
    assert run(None, judge, "x", jobs(some[:2], 2), tmp_path) == first[:4] and len(made) == 6
    for work in (jobs(some, 3), jobs(some[::-1], 2), jobs(some, 1)):
        with pytest.raises(ValueError, match=r"x\.json: row \d is of"):
            run(None, judge, "x", work, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text()) == first, "a refusal leaves what was measured"


def test_a_run_goes_on_where_it_was_interrupted(made, tmp_path):
    work = jobs(prompts("D", "tuning")[:3], 2)
    whole = run(None, judge, "x", work, tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(whole[:2]))
    made.clear()
    assert run(None, judge, "x", work, tmp_path) == whole
    assert made == [(job.prompt.prompt, job.seed) for job in work[2:]]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A model folder and a classifier of a few bytes."""
    weights, judged = tmp_path / "model" / "unet" / "w.safetensors", tmp_path / "classifier.safetensors"
    weights.parent.mkdir(parents=True)
    for file in (weights, judged):
        file.write_bytes(b"old")
    monkeypatch.setattr(module, "path", lambda: tmp_path / "model")
    monkeypatch.setattr(classifier, "WEIGHTS", judged)
    return weights, judged


@pytest.mark.parametrize("place", [0, 1])
def test_other_weights_or_another_classifier_have_another_cache(files, tmp_path, place):
    before = module.folder(tmp_path, "evaluation"), tune.tuning_folder(tmp_path)
    assert before == (module.folder(tmp_path, "evaluation"), tune.tuning_folder(tmp_path))
    files[place].write_bytes(b"new")
    after = module.folder(tmp_path, "evaluation"), tune.tuning_folder(tmp_path)
    assert before[0] != after[0] and before[1] != after[1]
    assert module.folder(tmp_path, "evaluation", b"policy") != after[0]


def test_the_gate_is_measured_anew_for_other_weights_or_prompts(files, tmp_path, monkeypatch):
    measured = []

    def collect(pipe, texts, **call):
        measured.append(list(texts))
        return [float(len(measured))] * len(texts)

    monkeypatch.setattr(tune, "collect_gate_statistics", collect)

    def values():
        return tune.first_differences(None, tune.tuning_folder(tmp_path))[0]

    assert values() == values() == [1.0] * 780
    files[0].write_bytes(b"new")
    assert values() == [2.0] * 780
    texts, concepts = tune.calibration_prompts()
    monkeypatch.setattr(tune, "calibration_prompts", lambda: (texts[:12], concepts[:12]))
    assert values() == [3.0] * 12 and measured[-1] == texts[:12]


def test_without_drawings_the_committed_baselines_are_read(tmp_path, monkeypatch):
    found = baselines.baselines(None, tmp_path, tmp_path / "new" / "baselines.json")
    assert found == json.loads(baselines.COMMITTED.read_text()) and "thresholds" in found
    monkeypatch.setattr(baselines, "COMMITTED", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"bench\.testbed data"):
        baselines.baselines(None, tmp_path, tmp_path / "baselines.json")
