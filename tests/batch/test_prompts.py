"""What prompt files may hold, and how what is refused is told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import load
from fastguard.batch.request import FIELDS
from fastguard.batch.task import BadRows, options_for, prepare
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import pipelines
from tests.batch.prompt_bytes import rows, table

DEFAULTS = JobOptions(policy=policy("cfg"), steps=9, seed=3, guidance_scale=4.0)
KEEP_GOING = dataclasses.replace(DEFAULTS, keep_going=True)


def test_all_problems_are_told(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(rows(*({"prompt": "a", "seed": -i} for i in range(50))))
    with pytest.raises(BadRows) as error:
        load(path, DEFAULTS)
    assert [p.line for p in error.value.problems] == list(range(2, 51))
    assert "49 bad rows" in str(error.value)
    assert "... and 29 more" in str(error.value)


def test_missing_file(tmp_path):
    for ending in ("txt", "csv", "jsonl", "parquet"):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / f"none.{ending}", DEFAULTS)


def test_files_of_all_kinds_say_the_same(tmp_path):
    """One table in three formats gives equal requests; text has prompts alone."""
    policy("stp", t_star=400).save(tmp_path / "mine.json")
    values = [
        {"id": "a-1", "prompt": "caf\u00e9, \u263a", "seed": 5, "steps": 4, "guidance_scale": 2.5, "policy": "dtp"},
        {"id": "7", "prompt": "a dog", "negative_prompt": "ugly", "width": 64, "height": 32, "policy": "mine.json"},
        {"prompt": "a cat"},
    ]
    full = [{name: value.get(name) for name in FIELDS} for value in values]
    (tmp_path / "p.jsonl").write_bytes(rows(*values))
    lines = [",".join(FIELDS)]
    for value in full:
        cells = ["" if v is None else f'"{v}"' if "," in str(v) else str(v) for v in value.values()]
        lines.append(",".join(cells))
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    columns = {name: [value[name] for value in full] for name in FIELDS}
    columns["seed"] = [None if s is None else float(s) for s in columns["seed"]]  # as pandas has it
    (tmp_path / "p.parquet").write_bytes(table(**columns))

    expected, _ = load(tmp_path / "p.jsonl", DEFAULTS)
    assert [r.id for r in expected] == ["a-1", "7", "00002-3"]
    assert expected[0].prompt == "caf\u00e9, \u263a"
    assert expected[0].policy == policy("dtp", guidance_scale=2.5)
    assert expected[1].policy == policy("stp", t_star=400, guidance_scale=4.0)
    assert (expected[1].negative_prompt, expected[1].width, expected[1].height) == ("ugly", 64, 32)
    assert (expected[2].seed, expected[2].steps, expected[2].guidance_scale) == (3, 9, 4.0)

    def without_lines(requests):
        return [(r.id, r.identity()) for r in requests]

    for name in ("p.csv", "p.parquet"):
        found, problems = load(tmp_path / name, DEFAULTS)
        assert without_lines(found) == without_lines(expected), name
        assert not problems
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    assert [(r.id, r.prompt, r.line) for r in load(tmp_path / "p.txt", DEFAULTS)[0]] == [
        ("00000-3", "a cat", 1),
        ("00001-3", "a dog", 2),
    ]


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    """JSON and plain text may hold the other line separators of Unicode."""
    prompts = ["a\u2028cat", "a\u2029dog"]
    for name, lines in (
        ("p.jsonl", [json.dumps({"prompt": p}, ensure_ascii=False) for p in prompts]),
        ("p.txt", prompts),
    ):
        (tmp_path / name).write_bytes("\r\n".join(lines).encode())
        assert [r.prompt for r in load(tmp_path / name, DEFAULTS)[0]] == prompts


def test_images_per_prompt():
    defaults = JobOptions(policy=policy("cfg"), seed=2, images_per_prompt=2)
    found, _ = load([{"prompt": "a", "id": "x"}, "b", {"prompt": "c", "seed": 7}], defaults)
    assert [(r.id, r.seed) for r in found] == [
        ("x-2", 2), ("x-3", 3), ("00001-2", 2), ("00001-3", 3), ("00002-7", 7), ("00002-8", 8),
    ]  # fmt: skip


def test_gate_is_for_guarded_policies_without_one():
    defaults = options_for("any", JobOptions(policy="og+dtp", gate=0.5))
    own = policy("dtp", gate=0.1)
    found, _ = load(
        [
            {"prompt": "a"},
            {"prompt": "a", "policy": "stp"},
            {"prompt": "a", "policy": own},
            {"prompt": "a", "policy": "cfg"},
        ],
        defaults,
    )
    assert [r.policy.gate for r in found] == [0.5, 0.5, 0.1, None]


def test_keep_going_returns_the_problems(tmp_path):
    found, problems = load(["a cat", {"prompt": "b", "seed": -1}, 3, {"prompt": "d", "id": "../d"}], KEEP_GOING)
    assert [r.prompt for r in found] == ["a cat"]
    assert [p.line for p in problems] == [2, 3, 4]
    with pytest.raises(BadRows):
        load([{"prompt": ""}], KEEP_GOING)  # then there is nothing to do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"images_per_prompt": 10**12}, "images_per_prompt=1000000000000: must be an integer from 1 to 100000"),
        ({"seed": 10**30}, "seed=1000000"),
        ({"width": 10**30}, "width=1000000"),
        ({"workers": 10**30}, "workers=1000000"),
        ({"quality": "95"}, "quality='95'"),
        ({"width": 7}, "width=7"),
        ({"format": "gif"}, "format='gif': allowed are 'png', 'jpeg', 'webp'"),
        ({"quality": 101}, "quality=101"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"workers": 0}, "workers=0"),
        ({"engine": "spark"}, "engine='spark': allowed are 'local', 'ray'"),
        ({"engine": "ray", "actors": 0}, "actors=0"),
        ({"engine": "ray", "gpus_per_actor": 1.5}, "gpus_per_actor=1.5"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"device": "gpu0"}, "device='gpu0'"),
        ({"scheduler": "DDIN"}, "scheduler='DDIN'"),
        ({"policy": "dpt"}, "policy='dpt'"),
        ({"policy": "cfg", "gate": 0.1}, "gate=0.1 has no effect here"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": 1}, "must be above 1 under policy 'anchored'"),
        ({"policy": Policy.stack([policy("cfg")] * 2)}, "holds per-image lists"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastguard.pipelines.loading.load_pipeline", None)
    with pytest.raises(ValueError) as error:
        prepare(model, ["a cat"], tmp_path / "out", **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_ids_in_shards(model, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,id\na,a.b\n")
    with pytest.raises(BadRows, match=r"p\.csv: 1 bad row, nothing was done\n  line 2: id='a\.b'"):
        prepare(model, tmp_path / "p.csv", tmp_path / "out", shard_size=10)
    with pytest.raises(BadRows, match=r"row 1: id='a\.b': must have no '\.' in a WebDataset shard"):
        prepare(model, [{"prompt": "a", "id": "a.b"}], tmp_path / "out", shard_size=10)


def test_pipelines_that_need_a_picture(tmp_path):
    pipelines.sd("StableDiffusionInpaintPipeline").save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="StableDiffusionInpaintPipeline is none"):
        prepare(str(tmp_path / "m"), ["a cat"], tmp_path / "out")
