"""`fastguard calibrate` and `fastguard demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import pyarrow as pa
import pytest
from pyarrow import parquet

import fastguard
from fastguard import testbed
from fastguard.batch.options import JobOptions
from fastguard.commands.calibrate import draws
from fastguard.pipelines.loading import chosen_policy, chosen_scale
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import pipelines
from tests.commands.invoking import invoke, refused


def ordinary(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"a {i}"}) + "\n" for i in range(count)))
    return path


def drawn(path: Path) -> tuple[list[str], list[str] | None]:
    """The prompts and groups that `calibrate` draws from a file."""
    requests, groups = draws(path, JobOptions(policy=policy("stp")))
    return [request.prompt for request in requests], groups


def test_calibrate(model, tmp_path):
    """The file it writes is the policy with the gate that the library finds from the same prompts, and says how it was found."""
    prompts, out = ordinary(tmp_path / "ordinary.jsonl", 8), tmp_path / "guard.json"
    result = invoke(
        "calibrate", model, "--prompts", prompts, "--out", out, "--policy", "stp", "--fpr", 0.4, "--confidence", 0.9,
        "--seeds", 2, "--steps", 3, "--guidance-scale", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = Policy.load(out)
    assert made == policy("stp", gate=made.gate, suspect=made.suspect)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    guard = fastguard.enable(pipe, "cfg")
    largest, collapses = [], []
    for i in range(8):
        pipe(
            [f"a {i}"] * 2,
            generator=pipelines.generators([2 * i, 2 * i + 1]),
            num_inference_steps=3,
            guidance_scale=4,
        )
        largest.append(max(image.rms_curve[0] for image in guard.report))
        collapses.append(min(image.d_curve[1] / image.d_curve[0] for image in guard.report))
    # P(Binomial(8, 0.4) = 0) = 0.017, <= 1: 0.106: none may exceed
    assert made.gate == pytest.approx(max(largest), rel=1e-4)
    assert made.suspect == pytest.approx(min(collapses), rel=1e-4)
    found = json.loads(out.read_text())["provenance"]
    assert (found["prompts"], found["seeds"], found["fpr"], found["steps"]) == (8, 2, 0.4, 3)
    assert found["statement"] in result.stdout


BAD_CALIBRATIONS = [
    ([], "ordinary.jsonl': fpr=0.01 at confidence=0.95 needs at least 299"),
    (["--fpr", "0"], "fpr=0.0"),
    (["--fpr", "1e-17"], "fpr=1e-17: must be at least 1e-12"),
    (["--policy", ""], "policy='': is empty"),
    (["--confidence", "1"], "confidence=1.0"),
    (["--policy", "cfg"], "policy='cfg': can have no gate, it guards no image"),
    (["--fpr", "0.5", "--seeds", "0"], "seeds=0"),
    (["--fpr", "0.5", "--steps", "0"], "steps=0"),
    (["--fpr", "0.5", "--out", "guard.txt"], "out='guard.txt': must be a .json file"),
    (["--fpr", "0.5", "--out", "nowhere/guard.json"], "in an existing directory"),
    (["--fpr", "0.5", "--dtype", "int8"], "dtype='int8'"),
    (["--prompts", "nowhere.jsonl"], "No such file or directory: nowhere.jsonl"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALIBRATIONS, ids=[" ".join(a) for a, _ in BAD_CALIBRATIONS])
def test_bad_calibrations(model, no_model, tmp_path, arguments, message):
    prompts, out = ordinary(tmp_path / "ordinary.jsonl", 8), tmp_path / "guard.json"
    assert message in refused("calibrate", model, "--prompts", prompts, "--out", out, *arguments)
    assert not out.exists()


def test_a_directory_is_no_policy_file(model, no_model, tmp_path):
    prompts, out = ordinary(tmp_path / "ordinary.jsonl", 8), tmp_path / "guard.json"
    out.mkdir()
    message = refused("calibrate", model, "--prompts", prompts, "--out", out, "--fpr", 0.5)
    assert f"out='{out}': must be a .json file in an existing directory" in message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path, end):
    """JSON allows the other line separators of Unicode within a string, and a carriage return between its tokens."""
    file = tmp_path / "ordinary.jsonl"
    prompts = ["a\u2028cat", "a\u0085dog", "a\u2029bird", "a fish"]
    text = end.join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts).replace(": ", ":\r") + end
    file.write_bytes(text.encode())
    assert drawn(file) == (prompts, None)


@pytest.mark.parametrize("line", ["a cat", '{"text": "a cat"}', '{"prompt": ""}', '["a"]', '{"prompt": 3}'])
def test_bad_jsonl(model, no_model, tmp_path, line):
    file = tmp_path / "ordinary.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    assert "line 2: " in refused("calibrate", model, "--prompts", file, "--out", tmp_path / "guard.json")


def test_calibration_by_groups(model, no_model, tmp_path):
    """Eight prompts of four things are four units: too few for what eight would prove."""
    file = tmp_path / "ordinary.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a {i}", "group": f"thing {i // 2}"}) + "\n" for i in range(8)))
    options = ("calibrate", model, "--prompts", file, "--out", tmp_path / "guard.json", "--fpr", 0.4)
    assert "4 ordinary groups of prompts in" in refused(*options)
    for line in (
        {"prompt": "a", "group": "a"},
        {"prompt": "b"},
        {"prompt": "b", "group": 3},
        {"prompt": "b", "group": ""},
    ):
        file.write_text('{"prompt": "a", "group": "a"}\n' + json.dumps(line) + "\n")
        assert "line 2" in refused(*options)


def lines(path: Path, *values: dict) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_spaces_make_neither_another_prompt_nor_another_group(model, no_model, tmp_path):
    options = ("calibrate", model, "--out", tmp_path / "guard.json", "--fpr", 0.4, "--prompts")
    spaced = ({"prompt": "a" + " " * (n + 1) + "dog"} for n in range(299))
    assert "line 2 repeats line 1" in refused(*options, lines(tmp_path / "spaced.jsonl", *spaced))
    assert "line 2 repeats line 1" in refused(
        *options, lines(tmp_path / "tab.jsonl", {"prompt": "a b"}, {"prompt": " a\tb\n"})
    )
    groups = ("a dog", "a dog ", " a  dog", "a\tdog")
    grouped = lines(
        tmp_path / "groups.jsonl", *({"prompt": f"a {i}", "group": group} for i, group in enumerate(groups))
    )
    assert "1 ordinary groups of prompts in" in refused(*options, grouped)


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.parquet", "p.txt"])
def test_every_file_that_generate_reads(tmp_path, name):
    """Their other columns are ignored, whatever is in them."""
    file = tmp_path / name
    prompts, seeds, groups = ["a cat", "a dog", "a cow"], ["x", "-1", ""], ["pet", "pet", "cattle"]
    if name == "p.txt":
        file.write_text("a cat\n\na dog\na cow\n")
    elif name == "p.csv":
        file.write_text(
            "seed,prompt,group,colour\n"
            + "".join(f"{s},{p},{g},red\n" for s, p, g in zip(seeds, prompts, groups, strict=True))
        )
    elif name == "p.jsonl":
        lines(file, *({"prompt": p, "group": g, "seed": s} for s, p, g in zip(seeds, prompts, groups, strict=True)))
    else:
        parquet.write_table(pa.table({"seed": seeds, "prompt": prompts, "group": groups}), file)
    assert drawn(file) == (prompts, None if name == "p.txt" else groups)


def test_no_policy_file_is_overwritten(model, no_model, tmp_path):
    prompts, out = ordinary(tmp_path / "ordinary.jsonl", 8), tmp_path / "guard.json"
    out.write_text("mine")
    assert "is there already, and is not overwritten" in refused(
        "calibrate", model, "--prompts", prompts, "--out", out, "--fpr", 0.5
    )
    assert out.read_text() == "mine"


def test_prompts_of_the_same_tokens_are_one_draw(model, tmp_path, monkeypatch):
    """CLIP's tokenizer sees no case, and nothing beyond its length (16 here)."""
    monkeypatch.setattr("fastguard.pipelines.statistics.collect_gate_statistics", None)
    options = (
        "calibrate",
        model,
        "--out",
        tmp_path / "guard.json",
        "--fpr",
        0.5,
        "--confidence",
        0.7,
        "--prompts",
    )
    for second, third in (("b", "A Cat"), ("a cat" + " b" * 20, "a cat" + " b" * 20 + " c")):
        file = lines(tmp_path / "ordinary.jsonl", {"prompt": "a cat"}, {"prompt": second}, {"prompt": third})
        assert f"prompt 3 has the tokens of prompt {1 if second == 'b' else 2}" in refused(*options, file)


def test_demo(monkeypatch, tmp_path):
    module = type(sys)("fastguard.testbed.demo")
    module.run_demo = lambda out: [out / "index.html"]
    monkeypatch.setitem(sys.modules, "fastguard.testbed.demo", module)
    result = invoke("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "demo" / "index.html")


def test_the_embedded_model_has_a_guidance_scale_of_its_own():
    plain, scaled = policy("dtp", gate=0.1), policy("dtp", gate=0.1, guidance_scale=5.0)
    for model in ("testbed", testbed.path(), testbed.load()):
        assert chosen_scale(model, None, plain) == testbed.GUIDANCE_SCALE == 3.0
        assert chosen_scale(model, 2.0, plain) == 2.0
        assert chosen_scale(model, None, scaled) is None  # the policy says it
        assert chosen_policy(model) == policy(testbed.policy_path())
    assert chosen_scale("owner/name", None, plain) is None
    assert chosen_policy("owner/name") == policy("anchored")
