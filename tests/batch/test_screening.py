"""`generate --screen` and `--remake`: who is guarded from the first row, what is made again, and that a crash costs neither."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import fastguard
from fastguard.batch.task import BadRows, generate, prepare
from fastguard.policies.presets import policy
from tests import pipelines
from tests.batch.jobs import lines

ROOT = Path(__file__).parents[2]
OPTIONS = {"steps": 3, "batch_size": 4, "progress": False}
PROMPTS = ("a cat", "two dogs", "a house")
ROWS = [{"id": f"r{i}", "prompt": PROMPTS[i % 3], "seed": i} for i in range(8)]


def by_id(out: Path) -> dict[str, dict]:
    return {line["id"]: line for line in lines(out)}


def pixels(out: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(out / f"{name}.png")).astype(int)


def means(pipe, negative: str | None = None) -> dict[str, float]:
    """Over two noises, by calls under plain guidance."""
    found = {}
    with fastguard.enable(pipe, "cfg") as guard:
        for prompt in PROMPTS:
            text = {} if negative is None else {"negative_prompt": [negative] * 2}
            pipe([prompt] * 2, num_inference_steps=3, generator=pipelines.generators([0, 1]), **text)
            found[prompt] = float(np.mean([image.rms_curve[0] for image in guard.report]))
    return found


def screening(bound: float, **fields):
    chosen = policy("og+stp", gate=1e6, t_star=400.0, **fields)
    return dataclasses.replace(chosen, provenance={"screen": {"noises": 2, "threshold": bound}})


def test_flagged_prompts_are_guarded_and_the_others_are_not(pipe, tmp_path, monkeypatch):
    """Each prompt is measured once; what is not flagged has the bits of plain guidance, the rest those of the policy without its gate."""
    expected = means(pipe)
    order = sorted(PROMPTS, key=expected.__getitem__)
    bound = (expected[order[1]] + expected[order[2]]) / 2
    calls = []
    stock = type(pipe.unet).forward
    monkeypatch.setattr(
        type(pipe.unet), "forward", lambda self, x, *a, **k: (calls.append(len(x)), stock(self, x, *a, **k))[1]
    )
    summary = generate(pipe, ROWS, tmp_path / "out", policy=screening(bound), screen=True, **OPTIONS)
    # Three prompts, two noises, two branches, in calls of four images at most; then two batches of four of three rows.
    assert calls == [8, 4, *[8] * 6]
    assert summary.caught == sum(row["prompt"] == order[2] for row in ROWS)
    generate(pipe, ROWS, tmp_path / "plain", policy="cfg", **OPTIONS)
    generate(pipe, ROWS, tmp_path / "guarded", policy=policy("og+stp", t_star=400.0), **OPTIONS)
    for name, line in by_id(tmp_path / "out").items():
        flagged = line["prompt"] == order[2]
        assert line["screen"]["flagged"] is flagged and line["screen"]["bound"] == bound
        assert line["screen"]["mean"] == pytest.approx(expected[line["prompt"]], rel=1e-4)
        assert (line["policy"], line["gate"]) == ("og+stp" if flagged else "cfg", None)
        other = pixels(tmp_path / ("guarded" if flagged else "plain"), name)
        found = pixels(tmp_path / "out", name)
        assert np.abs(found - other).max() <= 1 if flagged else np.array_equal(found, other)
        if flagged:
            assert np.abs(found - pixels(tmp_path / "plain", name)).max() > 1, "the guard does nothing here"
    assert generate(pipe, ROWS, tmp_path / "out", policy=screening(bound), screen=True, **OPTIONS).made == 0
    with pytest.raises(BadRows, match=r"was made in .* from other values"):
        generate(pipe, ROWS, tmp_path / "out", policy=screening(bound * 2), screen=True, **OPTIONS)


def test_what_a_statistic_belongs_to(pipe, tmp_path):
    """A prompt under another negative prompt is measured anew; rows under plain guidance are not measured."""
    bare, ugly = means(pipe), means(pipe, "ugly")
    rows = [
        {"prompt": "a cat"},
        {"prompt": "a cat", "negative_prompt": "ugly"},
        {"prompt": "a cat", "steps": 2},
        {"prompt": "a cat", "policy": "cfg"},
    ]
    generate(pipe, rows, tmp_path, policy=screening(0.05), screen=True, **OPTIONS)
    found = [line["screen"] for _, line in sorted(by_id(tmp_path).items())]
    assert found[0]["mean"] == pytest.approx(bare["a cat"], rel=1e-4)
    assert found[1]["mean"] == pytest.approx(ugly["a cat"], rel=1e-4)
    assert abs(found[2]["mean"] / found[0]["mean"] - 1) > 1e-3
    assert found[3] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "dtp", "screen": True}, "policy 'dtp': has neither a bound for screening nor a gate"),
        ({"policy": "cfg", "screen": True}, "screen=True: has no effect"),
        ({"policy": "dtp", "remake": True}, "remake=True: has no effect"),
    ],
)
def test_policies_without_a_bound_are_refused(model, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        prepare(model, ["a cat"], tmp_path / "out", **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_bound_is_enough(model, tmp_path, caplog):
    """A policy without a gate guards no ordinary prompt under --screen, so nothing is said of that; rows may name such a policy themselves."""
    dataclasses.replace(screening(0.05), gate=None).save(tmp_path / "bound.json")
    prepare(model, [{"prompt": "a cat", "policy": str(tmp_path / "bound.json")}], tmp_path / "out", screen=True)
    assert not caplog.records
    prepare(model, ["a cat"], tmp_path / "out", policy=tmp_path / "bound.json")
    assert "has no gate" in caplog.text


def test_a_bound_found_elsewhere_is_told(model, tmp_path, caplog):
    chosen = screening(0.05)
    known = {**chosen.provenance, "negative_prompt": "ugly", "width": None, "height": None}
    dataclasses.replace(chosen, provenance=known).save(tmp_path / "p.json")
    rows = [
        {"prompt": "a cat", "negative_prompt": "ugly"},
        {"prompt": "a dog", "width": 64},
        {"prompt": "a cow", "width": 64},
    ]
    prepare(model, rows, tmp_path / "out", policy=tmp_path / "p.json", screen=True)
    assert [record.message for record in caplog.records] == [
        "policy 'og+stp': its bound for screening was found with negative_prompt='ugly', not None and width=None, not 64"
    ]


def test_a_gate_stands_in_for_the_bound(pipe, tmp_path, caplog):
    generate(pipe, ["a cat"], tmp_path, policy="stp", gate=1e-6, screen=True, **OPTIONS)
    (line,) = lines(tmp_path)
    assert (line["screen"]["bound"], line["screen"]["noises"], line["screen"]["flagged"]) == (1e-6, 4, True)
    assert "has no bound on the mean over noises: its gate" in caplog.text


@pytest.fixture(scope="module")
def suspects(tmp_path_factory):
    """A policy under which some of the rows are suspect, those rows, and a run of it without remakes."""
    out = tmp_path_factory.mktemp("first") / "out"
    generate(pipelines.sd(), ROWS, out, policy="cfg", **OPTIONS)
    collapse = {name: line["collapse"] for name, line in by_id(out).items()}
    order = sorted(collapse, key=collapse.__getitem__)
    bound = (collapse[order[2]] + collapse[order[3]]) / 2
    return policy("cfg", suspect=bound), set(order[:3]), out


def test_suspects_are_made_again(pipe, tmp_path, suspects):
    """Beside the first image, which stays; the manifest has both, and the remake is the image of the preset without a gate."""
    chosen, suspect, first = suspects
    summary = generate(pipe, ROWS, tmp_path / "out", policy=chosen, remake=True, **OPTIONS)
    assert (summary.total, summary.made, summary.remade) == (11, 11, 3)
    assert summary.suspect == 3 and "made again: 3" in str(summary)
    found = by_id(tmp_path / "out")
    assert set(found) == {row["id"] for row in ROWS} | {f"{name}-remake" for name in suspect}
    wanted = [row for row in ROWS if row["id"] in suspect]
    generate(pipe, wanted, tmp_path / "anchored", policy="anchored", **OPTIONS)
    for name in suspect:
        one, again = found[name], found[f"{name}-remake"]
        assert one["suspect"] is True and one["remake_of"] is None
        assert (again["remake_of"], again["policy"], again["seed"]) == (name, "anchored", one["seed"])
        assert again["suspect"] is None  # the bound is one for plain guidance
        assert np.array_equal(pixels(tmp_path / "out", name), pixels(first, name))
        remake = pixels(tmp_path / "out", f"{name}-remake")
        assert np.abs(remake - pixels(tmp_path / "anchored", name)).max() <= 1
        assert np.abs(remake - pixels(first, name)).max() > 1
    assert generate(pipe, ROWS, tmp_path / "out", policy=chosen, remake=True, **OPTIONS).made == 0
    assert generate(pipe, ROWS, tmp_path / "out", policy=chosen, **OPTIONS).total == 8


def test_remakes_after_a_run_and_after_a_crash(pipe, tmp_path, suspects):
    """Asked for later, they alone are made; one that no line speaks of is found by its file, one that is gone is made again."""
    chosen, _, _ = suspects
    generate(pipe, ROWS, tmp_path, policy=chosen, **OPTIONS)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert generate(pipe, ROWS, tmp_path, policy=chosen, remake=True, **OPTIONS).made == 3
    manifest = tmp_path / "manifest.jsonl"
    kept = manifest.read_bytes().splitlines(keepends=True)
    assert all(b"-remake" in line for line in kept[-3:])
    manifest.write_bytes(b"".join(kept[:-2]) + kept[-2][:40])
    gone = json.loads(kept[-1])["file"]
    (tmp_path / gone).unlink()
    found = (tmp_path / json.loads(kept[-2])["file"]).stat().st_mtime_ns
    assert generate(pipe, ROWS, tmp_path, policy=chosen, remake=True, **OPTIONS).made == 1
    assert (tmp_path / json.loads(kept[-2])["file"]).stat().st_mtime_ns == found
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}.items()
    assert len(by_id(tmp_path)) == len(lines(tmp_path)) == 11


def test_remakes_in_shards(pipe, tmp_path, suspects):
    chosen, suspect, _ = suspects
    generate(pipe, ROWS, tmp_path, policy=chosen, shard_size=4, remake=True, **OPTIONS)
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = {s["__key__"]: json.loads(s["json"]) for s in webdataset.WebDataset(shards, shardshuffle=False)}
    assert set(samples) == {row["id"] for row in ROWS} | {f"{name}-remake" for name in suspect}
    assert {s["remake_of"] for s in samples.values()} == {None, *suspect}
    assert generate(pipe, ROWS, tmp_path, policy=chosen, shard_size=4, remake=True, **OPTIONS).made == 0


def test_anchored_rows_lose_their_gate_alone(pipe, tmp_path):
    chosen = policy("anchored", gate=1e6, suspect=1e9, guidance_scale=3.0, name="mine")
    generate(pipe, ["a cat"], tmp_path, policy=chosen, remake=True, **OPTIONS)
    line = by_id(tmp_path)["00000-0-remake"]
    values = json.loads(line["policy_json"])
    assert (values["name"], values["gate"], values["anchored"], values["guidance_scale"]) == ("mine", None, True, 3.0)
    assert line["share_curve"][0] == pytest.approx(1.0, abs=1e-3)


def test_names_of_remakes_are_left_to_them(pipe, tmp_path):
    rows = [{"id": "a", "prompt": "a cat"}, {"id": "a-remake", "prompt": "a dog"}]
    prepare(pipe, rows, tmp_path, policy=policy("cfg", suspect=0.1))
    with pytest.raises(BadRows, match="row 1: id='a': 'a-remake' must be left to its remake"):
        prepare(pipe, rows, tmp_path, policy=policy("cfg", suspect=0.1), remake=True)


@pytest.mark.slow
def test_killed_while_remaking(model, tmp_path):
    """SIGKILL among the remakes: nothing is lost or made twice, and both images of a suspect are listed."""
    out, file = tmp_path / "out", tmp_path / "policy.json"
    policy("cfg", suspect=1e9).save(file)
    rows = ROWS[:6]
    program = (
        "from fastguard.batch.task import generate\n"
        f"generate({model!r}, {rows!r}, {str(out)!r}, policy={str(file)!r}, remake=True, steps=8, batch_size=1, device='cpu', progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end and len(list(out.glob("*-remake.png"))) < 2:
        time.sleep(0.001)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 8 <= len(known) < 12
    options = {"policy": file, "remake": True, "steps": 8, "batch_size": 1, "device": "cpu", "progress": False}
    summary = generate(model, rows, out, **options)
    assert (summary.total, summary.made, summary.remade) == (12, 12 - len(known), 6)
    assert known.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}.items()
    assert len(lines(out)) == len(by_id(out)) == 12
