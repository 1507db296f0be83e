"""Values that mean the same make the same, whatever they come in: tables, NumPy's scalars; and what has no effect is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import fastguard
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import BadRows, load
from fastguard.batch.request import Request
from fastguard.batch.store import Directory
from fastguard.batch.task import generate, prepare
from fastguard.policies.presets import policy
from tests.batch.jobs import OPTIONS

DEFAULTS = JobOptions(policy=policy("cfg"), steps=9, seed=3)


def test_generate_is_the_function():
    from fastguard import generate as imported

    assert imported is fastguard.generate is generate


def test_seeds_that_the_generator_tells_apart():
    """torch's generator on the CPU reads 32 bits: s and s + 2^32 are one image, so no more than 2^32 seeds are taken."""
    noise = [torch.randn(4, generator=torch.Generator("cpu").manual_seed(5 + i)) for i in (0, 2**32, 1)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert load([{"prompt": "a", "seed": 2**32 - 1}], DEFAULTS)[0][0].seed == 2**32 - 1
    with pytest.raises(BadRows, match="seed=4294967296: must be an integer from 0 to 4294967295"):
        load([{"prompt": "a", "seed": 2**32}], DEFAULTS)
    two = JobOptions(policy=policy("cfg"), images_per_prompt=2)
    with pytest.raises(BadRows, match="from 0 to 4294967294"):
        load([{"prompt": "a", "seed": 2**32 - 1}], two)


def values(prompts):
    return [(r.id, r.prompt, r.seed, r.guidance_scale, r.line) for r in load(prompts, DEFAULTS)[0]]


def test_data_frames_and_tables():
    rows = [
        {"id": "x", "prompt": "a cat", "seed": 7, "guidance_scale": 2.5},
        {"prompt": "a dog"},
        {"prompt": "a cow", "seed": 8},
    ]
    expected = values(rows)
    assert expected == [("x", "a cat", 7, 2.5, 1), ("00001-3", "a dog", 3, None, 2), ("00002-8", "a cow", 8, None, 3)]
    frame = pd.DataFrame(rows)
    assert frame["seed"].dtype == float  # because of the gap
    assert values(frame) == expected
    assert values(frame.convert_dtypes()) == expected  # NA in place of NaN
    assert values(pa.Table.from_pylist(rows)) == expected
    assert values(frame["prompt"]) == [(f"{i:05d}-3", row["prompt"], 3, None, i + 1) for i, row in enumerate(rows)]


class Frame:
    """What polars offers: iterated over it gives its columns."""

    def __init__(self, rows):
        self.rows = rows

    def iter_rows(self, *, named=False):
        return iter(self.rows) if named else (tuple(row.values()) for row in self.rows)

    def __iter__(self):
        return iter(self.rows[0])


TABLE = [{"prompt": "a cat", "seed": 7, "width": None}, {"prompt": "a dog", "seed": None, "width": 64}]


@pytest.mark.parametrize("package", ["polars", "datasets", "none"])
def test_other_tables(package):
    """The packages themselves where they are installed."""
    tables = [Frame(TABLE)]
    if package == "polars":
        tables = [pytest.importorskip("polars").DataFrame(TABLE)]
    elif package == "datasets":
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(TABLE)
        tables = [made, made.to_iterable_dataset()]
        with pytest.raises(ValueError, match="a DatasetDict is no list"):
            load(datasets.DatasetDict(train=made), DEFAULTS)
    for table in tables:
        found = load(table, DEFAULTS)[0]
        assert [(r.prompt, r.seed, r.width) for r in found] == [("a cat", 7, None), ("a dog", 3, 64)]


def test_a_dict_is_no_list_of_prompts():
    with pytest.raises(ValueError, match="prompts: a dict is no list"):
        load({"prompt": "a cat"}, DEFAULTS)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_is_no_list_of_prompts(kind):
    """Its order, and with it ids and seeds, would be another one in each process."""
    with pytest.raises(ValueError, match=f"prompts: a {kind.__name__} has no order: must be a list"):
        load(kind({"a cat", "a dog"}), DEFAULTS)
    assert len(load({"a cat": 1, "a dog": 2}.keys(), DEFAULTS)[0]) == 2


def test_scalars_of_numpy():
    row = {
        "prompt": np.str_("a"),
        "seed": np.uint32(7),
        "steps": np.int64(4),
        "guidance_scale": np.float32(2.5),
        "width": torch.tensor(64),
    }
    (found,) = load([row], DEFAULTS)[0]
    assert (found.seed, found.steps, found.guidance_scale, found.width) == (7, 4, 2.5, 64)
    assert all(type(v) in (int, float) for v in (found.seed, found.steps, found.guidance_scale, found.width))
    options = JobOptions(policy=policy("cfg"), batch_size=np.int32(3), seed=np.int64(5), steps=np.int64(2))
    assert options.batch_size == 3
    (found,) = load(["a"], options)[0]
    assert json.dumps(found.identity())  # Python's own numbers
    with pytest.raises(ValueError, match="batch_size="):
        JobOptions(batch_size=np.float64(3.0))


@pytest.mark.parametrize("text", ["7.0", "7", "7."])
def test_whole_numbers_of_tables(tmp_path, text):
    """As pandas writes a column with gaps: the same in CSV, parquet and JSON."""
    (tmp_path / "p.csv").write_text(f"prompt,seed\na,{text}\n")
    parquet.write_table(pa.table({"prompt": ["a"], "seed": [7.0]}), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 7.0}\n')
    for name in ("p.csv", "p.parquet", "p.jsonl"):
        assert [r.seed for r in load(tmp_path / name, DEFAULTS)[0]] == [7]


@pytest.mark.parametrize("name", ["p.parquet", "p"])
def test_a_directory_of_parquet_files(tmp_path, name):
    """As Spark and Ray write a table; rows are counted through."""
    folder = tmp_path / name
    folder.mkdir()
    for i, prompts in enumerate((["a", "b"], ["c"])):
        parquet.write_table(pa.table({"prompt": prompts}), folder / f"part-{i}.parquet")
    (folder / "_SUCCESS").touch()
    assert [(r.prompt, r.line) for r in load(folder, DEFAULTS)[0]] == [("a", 1), ("b", 2), ("c", 3)]


def test_a_cell_beyond_the_limit_of_csv(tmp_path):
    """It is one bad row, not a bad file."""
    (tmp_path / "p.csv").write_text(f"prompt\na\n{'x' * 200_000}\nb\n")
    with pytest.raises(BadRows, match="line 3: prompt has 200000 characters") as error:
        load(tmp_path / "p.csv", DEFAULTS)
    assert [p.line for p in error.value.problems] == [3]
    found, problems = load(tmp_path / "p.csv", JobOptions(policy=policy("cfg"), keep_going=True))
    assert [r.prompt for r in found] == ["a", "b"]
    assert len(problems) == 1


def test_byte_order_marks_in_the_middle(tmp_path):
    """Of files that were put together."""
    for name, content in (
        ("p.txt", "\ufeffa\n\ufeffb\n"),
        ("p.csv", "\ufeffprompt\na\n\ufeffb\n"),
        ("p.jsonl", '\ufeff{"prompt": "a"}\n\ufeff{"prompt": "b"}\n'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [r.prompt for r in load(tmp_path / name, DEFAULTS)[0]] == ["a", "b"], name


def test_blank_lines_of_text_are_skipped(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\n \t\nb\n\n")
    assert [(r.prompt, r.line, r.id) for r in load(tmp_path / "p.txt", DEFAULTS)[0]] == [
        ("a", 1, "00000-3"),
        ("b", 4, "00001-3"),
    ]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_other_separators_are_named(tmp_path, separator):
    (tmp_path / "p.csv").write_text(separator.join(["id", "prompt"]) + "\n" + separator.join(["x", "a"]) + "\n")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "p.csv", DEFAULTS)
    assert f"p.csv: line 1: the separator is {separator!r}: must be a comma" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actors": 2}, "actors=2: has no effect without engine='ray'"),
        ({"gpus_per_actor": 1}, "gpus_per_actor=1.0: has no effect without engine='ray'"),
        ({"ray_address": "auto"}, "ray_address='auto': has no effect without engine='ray'"),
        ({"quality": 90}, "quality=90: has no effect without format='jpeg' or 'webp'"),
        ({"engine": "ray", "workers": 2}, "workers=2: has no effect without engine='local'"),
        ({"format": "jpg"}, "format='jpg': allowed are 'png', 'jpeg', 'webp'; did you mean 'jpeg'?"),
        ({"policy": "dpt"}, "did you mean 'dtp'?"),
        ({"scheduler": "DDIN"}, "did you mean 'DDIM'?"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_without_effect_and_near_misses(model, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        prepare(model, ["a"], tmp_path / "out", **options)
    assert message in str(error.value)


def test_unknown_options_are_refused(model, tmp_path):
    with pytest.raises(TypeError, match=r"no option 'guidence_scale'; did you mean 'guidance_scale'\?"):
        generate(model, ["a"], tmp_path / "out", guidence_scale=3)


def test_the_same_defaults_in_python_and_on_the_command_line(tmp_path):
    """The embedded model has its own policy and scale, by name, by path and as a pipeline."""
    from fastguard import testbed

    for model in ("testbed", testbed.path()):
        (request,) = prepare(model, ["a"], tmp_path / "out").requests
        assert request.policy == policy(testbed.policy_path(), guidance_scale=testbed.GUIDANCE_SCALE)


def test_ids_of_an_earlier_run_in_a_directory_that_ignores_case(pipe, tmp_path, monkeypatch):
    """`cat` would overwrite `Cat`, whether the manifest has it already or a crash came before."""
    monkeypatch.setattr("fastguard.batch.store.ignores_case", lambda out: True)
    generate(pipe, [{"id": "Cat", "prompt": "a"}], tmp_path, **OPTIONS)
    before = (tmp_path / "Cat.png").read_bytes()
    rows = [{"id": "cat", "prompt": "b"}, {"id": "dog", "prompt": "b"}]
    with pytest.raises(BadRows, match="row 1: id='cat': is the same file as id='Cat' here"):
        generate(pipe, rows, tmp_path, **OPTIONS)
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(BadRows, match="id='cat': is the same file as id='Cat' here"):
        generate(pipe, rows, tmp_path, **OPTIONS)
    summary = generate(pipe, rows, tmp_path, **OPTIONS, keep_going=True)
    assert (summary.made, summary.rejected_ids) == (1, ("cat",))
    assert (tmp_path / "Cat.png").read_bytes() == before
    assert generate(pipe, [{"id": "Cat", "prompt": "a"}], tmp_path, **OPTIONS).total == 1


def test_unicode_forms_of_a_name(tmp_path, monkeypatch):
    """Ids are ASCII; the names of other files in the directory need not be."""
    monkeypatch.setattr("fastguard.batch.store.ignores_case", lambda out: True)
    requests = [Request(id=name, prompt="a", policy=policy("cfg")) for name in ("caf\u00e9", "dog")]
    refused = Directory(tmp_path, ".png").refused(requests, ["Cafe\u0301", "dog"])
    assert [p.values["id"] for p in refused] == ["caf\u00e9"]


def test_a_run_that_made_no_image_pins_no_settings(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastguard.batch.local.LocalRunner.make", lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
    )
    with pytest.raises(RuntimeError, match="broken"):
        generate(pipe, ["a"], tmp_path, **OPTIONS)
    generate(pipe, ["a"], tmp_path, **OPTIONS, keep_going=True)  # all fail, and rejected.jsonl says so
    monkeypatch.undo()
    assert generate(pipe, ["a"], tmp_path, **OPTIONS, format="webp").made == 1
    with pytest.raises(ValueError, match='format is "webp" there, "png" here'):
        generate(pipe, ["a"], tmp_path, **OPTIONS)
