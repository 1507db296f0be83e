"""What prompt files must not hold: every bad input is refused with its line, and nothing is written."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fastguard.batch.task import prepare
from fastguard.policies.presets import policy
from tests.batch.prompt_bytes import one, rows, table

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
        "row 2: not a readable row: ",
    ),
    "day of the year 30000": (
        "p.parquet",
        table(prompt=["a", "b"], seed=pa.array([1, 10**7], pa.date32())),
        "row 2: not a readable row: ",
    ),
    "duration": (
        "p.parquet",
        table(prompt=["a", "b"], seed=pa.array([None, 2**62], pa.duration("s"))),
        "row 2: not a readable row: ",
    ),
    "time zone": (
        "p.parquet",
        table(prompt=["a"], seed=pa.array([1], pa.timestamp("s", tz="Nowhere/Else"))),
        "row 1: not a readable row: ",
    ),
    "parquet not UTF-8": (
        "p.parquet",
        table(prompt=pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"], pa.binary()).buffers())),
        "row 2: not a readable row: ",
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
