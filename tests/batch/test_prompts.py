"""What prompt files may hold, and what is refused: every bad input with its line, and nothing written."""

from __future__ import annotations

import dataclasses
import io
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import load
from fastguard.batch.request import FIELDS, checked
from fastguard.batch.task import BadRows, prepare
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import pipelines

DEFAULTS = JobOptions(policy=policy("cfg"), steps=9, seed=3, guidance_scale=4.0)
KEEP_GOING = dataclasses.replace(DEFAULTS, keep_going=True)


def table(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def rows(*values: dict) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def one(**values) -> bytes:
    """A good row and a bad one, in line 2."""
    return rows({"prompt": "a cat"}, {"prompt": "a dog"} | values)


BAD = {
    # files
    "ending": ("prompts.md", b"a cat\n", "must end in .txt, .csv, .jsonl, .parquet"),
    "empty txt": ("p.txt", b"", "there is no prompt in it"),
    "empty csv": ("p.csv", b"", "there is no prompt in it"),
    "header alone": ("p.csv", b"prompt,seed\n", "there is no prompt in it"),
    "empty jsonl": ("p.jsonl", b"", "there is no prompt in it"),
    "empty parquet": ("p.parquet", table(prompt=pa.array([], pa.string())), "there is no prompt in it"),
    "no parquet": ("p.parquet", b"prompt\na cat\n", "not a readable parquet file"),
    "cut parquet": ("p.parquet", table(prompt=["a cat"])[:-20], "not a readable parquet file"),
    "0 bytes of parquet": ("p.parquet", b"", "not a readable parquet file"),
    # text
    "blank lines alone": ("p.txt", b"\n \t \n", "there is no prompt in it"),
    "not UTF-8": ("p.txt", b"a cat\na \xff dog\n", "line 2: prompt='a \\udcff dog': is not UTF-8 text"),
    "UTF-16": ("p.txt", "a cat\n".encode("utf-16"), "line 1: prompt="),
    "NUL": ("p.txt", b"a cat\na\x00dog\n", "line 2: prompt='a\\x00dog': must not hold the control character"),
    "escape code": ("p.txt", b"\x1b[31mred\n", "line 1: prompt='\\x1b[31mred': must not hold"),
    "huge prompt": ("p.txt", b"x" * 5001, "line 1: prompt has 5001 characters: at most 5000"),
    # csv
    "unknown column": ("p.csv", b"prompt,sede\na,1\n", "line 1: unknown column 'sede': allowed are id, prompt"),
    "column twice": ("p.csv", b"prompt,seed,seed\na,1,2\n", "line 1: column 'seed' is there twice"),
    "no prompt column": ("p.csv", b"id,seed\na,1\n", "line 1: there is no column 'prompt'"),
    "no header": ("p.csv", b"a red cat,7\n", "line 1: unknown column 'a red cat'"),
    "too many cells": ("p.csv", b"prompt,seed\na,1\na,b,2\n", "line 3: has 3 cells, but the header has 2 columns"),
    "too few cells": ("p.csv", b"prompt,seed\na,1\nb\n", "line 3: has 1 cells"),
    "after a long cell": ("p.csv", b'prompt,seed\n"a\nlong\ncell",1\nb,x\n', "line 5: seed='x'"),
    "open quote": ("p.csv", b'prompt\n"a cat\nb\n', "line 2: not valid CSV"),
    "quote inside": ("p.csv", b'prompt\n"a" cat\n', "line 2: not valid CSV"),
    "csv not UTF-8": ("p.csv", b"prompt,id\na,x\n\xe9,y\n", "line 3: prompt='\\udce9': is not UTF-8 text"),
    "seed with fraction": ("p.csv", b"prompt,seed\na,1.5\n", "line 2: seed=1.5: must be an integer from 0"),
    "seed in words": ("p.csv", b"prompt,seed\na,one\n", "line 2: seed='one'"),
    "underscores": ("p.csv", b"prompt,seed\na,1_000\n", "line 2: seed='1_000'"),
    "other digits": ("p.csv", "prompt,seed\na,１２\n".encode(), "line 2: seed="),
    "NaN in csv": ("p.csv", b"prompt,guidance_scale\na,nan\n", "line 2: guidance_scale='nan': must be a number"),
    "infinite in csv": ("p.csv", b"prompt,guidance_scale\na,1e999\n", "line 2: guidance_scale='1e999'"),
    "no prompt in a row": ("p.csv", b"prompt,seed\n,1\n", "line 2: prompt=None: must be text"),
    # jsonl
    "no JSON": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": a}\n', "line 2: not valid JSON"),
    "cut JSON": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b', "line 2: not valid JSON"),
    "blank jsonl line": ("p.jsonl", b'{"prompt": "a"}\n\n', "line 2: not valid JSON"),
    "a list": ("p.jsonl", b'["a cat"]\n', "line 1: is a JSON list: must be an object"),
    "a string": ("p.jsonl", b'"a cat"\n', "line 1: is a JSON str"),
    "deep": ("p.jsonl", b"[" * 100_000 + b"\n", "line 1: "),
    "NaN in JSON": ("p.jsonl", b'{"prompt": "a", "guidance_scale": NaN}\n', "line 1: NaN is not a number of JSON"),
    "a field twice": ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "line 1: the key 'prompt' occurs twice"),
    "jsonl not UTF-8": ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2: is not UTF-8 text"),
    "surrogate as a policy": ("p.jsonl", b'{"prompt": "a", "policy": "\\ud800"}\n', "line 1: policy='\\ud800': is not"),
    "surrogate in a path": ("p.jsonl", one(policy="\ud800.json"), "line 2: policy='\\ud800.json': is not UTF-8 text"),
    "surrogate in a policy": (
        "p.jsonl",
        one(policy={"fastguard_policy": 1, "name": "\ud800"}),
        "line 2: name='\\ud800': must be UTF-8 text",
    ),
    "surrogate as a field": ("p.jsonl", one(**{"\ud800": 1}), "line 2: unknown field '\\ud800'"),
    "surrogate as a policy's field": (
        "p.jsonl",
        one(policy={"fastguard_policy": 1, "\ud800": 1}),
        "line 2: unknown policy field '\\ud800'",
    ),
    "surrogate as a negative prompt": (
        "p.jsonl",
        one(negative_prompt="\ud800"),
        "line 2: negative_prompt='\\ud800': is",
    ),
    "surrogate as an id": ("p.jsonl", one(id="\ud800"), "line 2: id='\\ud800'"),
    "NUL in a policy": ("p.jsonl", one(policy="\0.json"), "line 2: policy='\\x00.json': must not hold"),
    "lone surrogate": ("p.jsonl", b'{"prompt": "\\ud800"}\n', "line 1: prompt='\\ud800': is not UTF-8 text"),
    "unknown field": ("p.jsonl", one(n_steps=3), "line 2: unknown field 'n_steps': allowed are id, prompt"),
    "prompt a number": ("p.jsonl", one(prompt=7), "line 2: prompt=7: must be text"),
    "prompt a list": ("p.jsonl", one(prompt=["a"]), "line 2: prompt=['a']: must be text"),
    "negative prompt a number": ("p.jsonl", one(negative_prompt=1), "line 2: negative_prompt=1: must be text"),
    "huge field": ("p.jsonl", one(**{"x" * 10**6: 1}), "line 2: unknown field 'xxx"),
    "huge column": ("p.csv", b"prompt," + b"x" * 10**5 + b"\n", "line 1: unknown column 'xxx"),
    "huge field twice": ("p.jsonl", b"{" + 2 * (b'"' + b"x" * 10**5 + b'": 1,') + b"}\n", "line 1: not valid JSON"),
    "huge field again": ("p.jsonl", b'{"%b": 1, "%b": 1}\n' % (b"x" * 10**5, b"x" * 10**5), "line 1: the key 'xxx"),
    "nested": ("p.jsonl", b'{"prompt": "a", "seed": ' + b"[" * 900 + b"]" * 900 + b"}\n", "line 1: seed=[[["),
    "negative seed": ("p.jsonl", one(seed=-1), "line 2: seed=-1: must be an integer from 0 to"),
    "huge seed": ("p.jsonl", one(seed=2**32), "line 2: seed=4294967296: must be an integer from 0 to 4294967295"),
    "seed too long to parse": (
        "p.jsonl",
        b'{"prompt": "a"}\n{"prompt": "b", "seed": ' + b"9" * 5000 + b"}\n",
        "line 2: Exceeds the limit (4300 digits) for integer string conversion",
    ),
    "integer too long to parse in a policy": (
        "p.jsonl",
        b'{"prompt": "a", "policy": {"fastguard_policy": 1, "gate": -' + b"9" * 5000 + b"}}\n",
        "line 1: Exceeds the limit (4300 digits)",
    ),
    "seed too long to parse in csv": (
        "p.csv",
        b"prompt,seed\na,1\nb," + b"9" * 5000 + b"\n",
        "line 3: seed='999",
    ),
    "seed a float": ("p.jsonl", one(seed=1.5), "line 2: seed=1.5"),
    "seed a bool": ("p.jsonl", one(seed=True), "line 2: seed=True"),
    "no steps": ("p.jsonl", one(steps=0), "line 2: steps=0: must be an integer from 1"),
    "too many steps": ("p.jsonl", one(steps=10**9), "line 2: steps=1000000000"),
    "negative scale": ("p.jsonl", one(guidance_scale=-1), "line 2: guidance_scale=-1: must be a number from 0"),
    "huge scale": ("p.jsonl", one(guidance_scale=1e9), "line 2: guidance_scale=1000000000:"),
    "scale a list": ("p.jsonl", one(guidance_scale=[7.5]), "line 2: guidance_scale=[7.5]"),
    "narrow": ("p.jsonl", one(width=0), "line 2: width=0: must be an integer from 8"),
    "wide": ("p.jsonl", one(width=10**9), "line 2: width=1000000000"),
    "height a text": ("p.jsonl", one(height="tall"), "line 2: height='tall'"),
    "odd size": ("p.jsonl", one(width=36), "line 2: width=36: must be a multiple of 8"),
    "steps beyond training": ("p.jsonl", one(steps=1001), "line 2: steps=1001: must be at most 1000"),
    # policies
    "unknown policy": ("p.jsonl", one(policy="dpt"), "line 2: policy='dpt': allowed are cfg"),
    "huge policy": ("p.jsonl", one(policy="x" * 4999), "line 2: policy='xxx"),
    "huge path of a policy": ("p.jsonl", one(policy="x" * 4990 + ".json"), "line 2: policy='xxx"),
    "policy a long list": ("p.jsonl", one(policy=[1] * 10**5), "line 2: policy=[1, 1, "),
    "huge value in a policy": (
        "p.jsonl",
        one(policy={"fastguard_policy": 1, "rule": "x" * 10**6}),
        "allowed are 'minimum', 'drop'",
    ),
    "huge object in a policy": ("p.jsonl", one(policy={"fastguard_policy": 1, "rule": {"x" * 10**6: 1}}), "rule={'xxx"),
    "huge min_step": (
        "p.jsonl",
        one(policy={"fastguard_policy": 1, "transition": "dynamic", "min_step": 10**30}),
        "line 2: min_step=1000000000000000000000000000000: must be from 0 to 10000",
    ),
    "huge scale of a policy": (
        "p.jsonl",
        one(policy={"fastguard_policy": 1, "guidance_scale": 1e300}),
        "line 2: guidance_scale=1e+300: must be from 0 to 1000",
    ),
    "policy a number": ("p.jsonl", one(policy=3), "line 2: policy=3: must be a preset"),
    "no policy file": ("p.jsonl", one(policy="none.json"), "line 2: policy='none.json': No such file"),
    "policy without a version": ("p.jsonl", one(policy={"before": "zero"}), "line 2: not a fastguard policy"),
    "per-image lists": (
        "p.jsonl",
        one(policy={"fastguard_policy": 1, "monitor": [True]}),
        "holds per-image lists: must be for one image",
    ),
    "schedule of another length": (
        "p.jsonl",
        one(policy=policy("dtp", guidance_scale=(3.0, 2.0)).to_dict()),
        "line 2: policy 'dtp': guidance_scale has 2 values, must have one per denoiser row: 9 at steps=9",
    ),
    "two scales": (
        "p.jsonl",
        one(policy=policy("cfg", guidance_scale=5.0).to_dict(), guidance_scale=4),
        "line 2: guidance_scale=4: policy 'cfg' sets its own",
    ),
    "guarded without guidance": ("p.jsonl", one(policy="dtp", guidance_scale=1), "must be above 1 under policy 'dtp'"),
    # ids
    "id twice": ("p.jsonl", rows(*[{"prompt": "a", "id": "x"}] * 2), "line 2: id='x': is that of line 1 too"),
    "given and made id": ("p.jsonl", one(id="00000-3"), "line 2: id='00000-3': is that of line 1 too"),
    "parent": ("p.jsonl", one(id="../x"), "line 2: id='../x': must be 1 to 200 letters"),
    "absolute": ("p.jsonl", one(id="/etc/passwd"), "line 2: id='/etc/passwd'"),
    "below": ("p.jsonl", one(id="a/b"), "line 2: id='a/b'"),
    "backslash": ("p.jsonl", one(id="a\\b"), "line 2: id='a\\\\b'"),
    "dots": ("p.jsonl", one(id=".."), "line 2: id='..'"),
    "hidden": ("p.jsonl", one(id=".lock"), "line 2: id='.lock'"),
    "option": ("p.jsonl", one(id="-rf"), "line 2: id='-rf'"),
    "NUL in an id": ("p.jsonl", one(id="a\0"), "line 2: id='a\\x00'"),
    "line feed in an id": ("p.jsonl", one(id="a\n"), "line 2: id='a\\n'"),
    "device": ("p.jsonl", one(id="con"), "line 2: id='con'"),
    "other letters": ("p.jsonl", one(id="b\u00e4r"), "line 2: id='b\u00e4r'"),
    "huge id": ("p.jsonl", one(id="x" * 201), "line 2: id='xxx"),
    "empty id": ("p.jsonl", one(id=""), "line 2: id=''"),
    "id a float": ("p.jsonl", one(id=1.5), "line 2: id=1.5"),
    "id an object": ("p.jsonl", one(id={}), "line 2: id={}"),
    # parquet
    "column of parquet": ("p.parquet", table(prompt=["a"], size=[1]), "unknown column 'size'"),
    "parquet without prompts": ("p.parquet", table(id=["a"]), "there is no column 'prompt'"),
    "null prompt": ("p.parquet", table(prompt=["a", None]), "row 2: prompt=None"),
    "NaN in parquet": ("p.parquet", table(prompt=["a"], guidance_scale=[float("nan")]), "row 1: guidance_scale=nan"),
    "NaN as a seed": ("p.parquet", table(prompt=["a"], seed=[float("nan")]), "row 1: seed=nan"),
    "bytes": ("p.parquet", table(prompt=[b"a"]), "row 1: prompt=b'a': must be text"),
    "numbers": ("p.parquet", table(prompt=[1, 2]), "row 1: prompt=1: must be text"),
    "year 30000": (
        "p.parquet",
        table(prompt=["a", "b"], seed=pa.array([None, 10**12], pa.timestamp("s"))),
        "row 2: seed: not a readable timestamp[ms]: ",
    ),
    "day of the year 30000": (
        "p.parquet",
        table(prompt=["a", "b"], seed=pa.array([1, 10**7], pa.date32())),
        "row 2: seed: not a readable date32[day]: ",
    ),
    "duration": (
        "p.parquet",
        table(prompt=["a", "b"], seed=pa.array([None, 2**62], pa.duration("s"))),
        "row 2: seed: not a readable duration[s]: ",
    ),
    "time zone": (
        "p.parquet",
        table(prompt=["a"], seed=pa.array([1], pa.timestamp("s", tz="Nowhere/Else"))),
        "row 1: seed: not a readable timestamp[ms, tz=Nowhere/Else]: ",
    ),
    "parquet not UTF-8": (
        "p.parquet",
        table(prompt=pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"], pa.binary()).buffers())),
        "row 2: prompt: not a readable string: ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, model, tmp_path, monkeypatch):
    """Refused with the line, before a model is loaded; nothing is written."""
    monkeypatch.setattr("fastguard.pipelines.loading.load_pipeline", None)
    file, content, message = BAD[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare(model, path, tmp_path / "out", policy="cfg", steps=9, seed=3)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable() or "\n" in str(error.value)
    assert len(str(error.value)) < 1000
    assert list(tmp_path.iterdir()) == [path]


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
    defaults = checked(JobOptions(policy=policy("og+dtp"), gate=0.5))
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
