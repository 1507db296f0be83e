"""The command line on a tiny random model: what it makes, what it refuses, and that a killed run is resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastguard
from fastguard import cli, testbed
from fastguard.cli import app
from fastguard.generate import Interrupted
from fastguard.inspection import inspect_model
from fastguard.policy import Policy, policy
from tests import pipelines

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red cat", "two dogs", "a house by the sea"]


def invoke(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args: object) -> str:
    """Standard error of a command that must be refused with exit code 2."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.replace("│", " ").split())  # typer wraps its own messages in a box


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(path)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastguard.models.load_pipeline", load)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return image.text


# generate ------------------------------------------------------------------------------------------------------------------


def test_generate(model, tmp_path):
    """The images are those that the library makes, each with its own generator, and say what they are."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("\n".join(PROMPTS) + "\n")
    result = invoke(
        "generate", model, "--prompts", file, "--out", out, "--steps", 3, "--seed", 7,
        "--images-per-prompt", 2, "--batch-size", 4, "--policy", "og+dtp", "--gate", 1e-6, "--negative-prompt", "ugly",
        "--guidance-scale", 4, "--scheduler", "eulerdiscrete", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 images, 6 of them made now" in result.stdout
    names = [f"0000{i}-{seed}.png" for i in range(3) for seed in (7, 8)]
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        *names,
        "manifest.jsonl",
        "report.json",
        "settings.json",
    ]

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    fastguard.enable(pipe, "og+dtp", gate=1e-6)
    expected = pipe(
        [prompt for prompt in PROMPTS for _ in range(2)][:4],
        negative_prompt=["ugly"] * 4,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=pipelines.generators([7, 8, 7, 8]),
    ).images
    for name, image in zip(names, expected, strict=False):
        assert np.abs(pixels(out / name).astype(int) - np.asarray(image).astype(int)).max() <= 1

    text = texts(out / "00001-8.png")
    assert text["prompt"] == "two dogs"
    assert text["negative_prompt"] == "ugly"
    assert (text["seed"], text["steps"], text["policy"]) == ("8", "3", "og+dtp")
    assert text["gate"].startswith("caught at row 0")
    assert text["scheduler"] == "EulerDiscreteScheduler"
    report = json.loads((out / "report.json").read_text())
    assert [entry["file"] for entry in report["images"]] == names
    entry = report["images"][3]
    record = {key: value for key, value in entry.items() if key not in ("file", "bytes", "mtime_ns", "sha256")}
    assert json.loads(text["fastguard"]) == record
    assert entry["gate"]["caught"] is True
    assert len(entry["d_curve"]) == 3
    assert Policy.from_dict(entry["policy"]) == policy("og+dtp", gate=1e-6, guidance_scale=4.0)


def test_unicode_prompt(model, tmp_path):
    assert (
        invoke(
            "generate",
            model,
            "--prompt",
            "café ☺",
            "--out",
            tmp_path,
            "--steps",
            1,
            "--policy",
            "cfg",
        ).exit_code
        == 0
    )
    assert texts(tmp_path / "00000-0.png")["prompt"] == "café ☺"
    assert json.loads((tmp_path / "report.json").read_text())["images"][0]["prompt"] == "café ☺"


def test_finished_images_are_kept_and_damaged_ones_made_again(model, tmp_path, monkeypatch):
    command = (
        "generate",
        model,
        "--prompt",
        "a cat",
        "--out",
        tmp_path,
        "--steps",
        2,
        "--images-per-prompt",
        4,
        "--batch-size",
        1,
        "--policy",
        "cfg",
    )
    assert invoke(*command).exit_code == 0
    files = sorted(tmp_path.glob("*.png"))
    pictures = [pixels(file) for file in files]
    good = [file.read_bytes() for file in files]
    stamps = [file.stat().st_mtime_ns for file in files]
    files[0].write_bytes(good[0][: len(good[0]) // 2])  # truncated
    flipped = bytearray(good[1])
    flipped[len(flipped) - 40] ^= 1  # one bit of the picture
    files[1].write_bytes(flipped)
    files[2].write_bytes(good[3])  # another image of the same run
    (tmp_path / ".00000-0.png.x7.tmp").write_bytes(b"left by a killed run")
    result = invoke(*command)
    assert result.exit_code == 0
    assert "4 images, 3 of them made now" in result.stdout
    for file, picture in zip(files, pictures, strict=True):
        assert np.array_equal(pixels(file), picture)
    assert files[3].stat().st_mtime_ns == stamps[3]
    assert not list(tmp_path.glob(".*.tmp"))

    (tmp_path / "report.json").unlink()
    monkeypatch.setattr("fastguard.models.load_pipeline", None)  # nothing is missing: no model is loaded
    assert "4 images, 0 of them made now" in invoke(*command).stdout
    assert (tmp_path / "report.json").exists()


def test_killed_run_is_resumed(model, tmp_path):
    """SIGKILL at any moment: no image is lost, damaged or made twice, and the end is that of an uninterrupted run."""
    arguments = [
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--steps",
        4,
        "--images-per-prompt",
        6,
        "--policy",
        "stp",
        "--batch-size",
        1,
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["generate", model, *arguments, "--out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastguard", *map(str, command), str(killed)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 120
    while len(list(killed.glob("*.png"))) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    assert "another process is writing there" in refused(*command, killed)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file.name: file.stat().st_mtime_ns for file in killed.glob("*.png")}
    assert 3 <= len(before) < 12
    assert not (killed / "report.json").exists()
    result = invoke(*command, killed)
    assert result.exit_code == 0, result.output
    assert f"12 images, {12 - len(before)} of them made now" in result.stdout
    assert invoke(*command, whole).exit_code == 0
    for name, stamp in before.items():
        assert (killed / name).stat().st_mtime_ns == stamp
    files = sorted(file.name for file in whole.iterdir())
    assert sorted(file.name for file in killed.iterdir()) == files
    for name in files:
        if name.endswith(".png"):
            assert np.array_equal(pixels(killed / name), pixels(whole / name)), name


def test_disabled_guard(model, tmp_path, monkeypatch):
    """FASTGUARD_DISABLE=1 makes stock images; the record says that there is no report."""
    monkeypatch.setenv("FASTGUARD_DISABLE", "1")
    result = invoke("generate", model, "--prompt", "a cat", "--out", tmp_path, "--steps", 2, "--policy", "dtp")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["images"][0]["d_curve"] is None
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    stock = pipe("a cat", num_inference_steps=2, generator=pipelines.generators([0])).images[0]
    assert np.array_equal(pixels(tmp_path / "00000-0.png"), np.asarray(stock))
    monkeypatch.delenv("FASTGUARD_DISABLE")
    assert 'guard is "disabled" there' in refused(
        "generate", model, "--prompt", "a cat", "--out", tmp_path, "--steps", 2, "--policy", "dtp"
    )


def test_failed_write_leaves_no_part(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    command = (
        "generate",
        model,
        "--prompt",
        "a cat",
        "--out",
        tmp_path,
        "--steps",
        1,
        "--policy",
        "cfg",
    )
    monkeypatch.setattr("fastguard.files.os.fsync", full)
    assert invoke(*command).exit_code != 0
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.png"))
    assert invoke(*command).exit_code == 0


def test_exit_codes(model, tmp_path, monkeypatch):
    command = ("generate", model, "--prompt", "a cat", "--out", tmp_path, "--steps", 1, "--policy", "cfg")
    errors = {
        143: Interrupted(signal.SIGTERM),
        130: Interrupted(signal.SIGINT),
        1: OSError(28, "No space left on device"),
    }
    for code, error in errors.items():

        def run(self, error=error):
            raise error

        monkeypatch.setattr("fastguard.generate.Task.run", run)
        result = invoke(*command)
        assert result.exit_code == code
        assert "resumes" in result.stderr


BAD = [
    (["--policy", "dpt"], "policy='dpt': allowed are cfg"),
    (["--policy", "nowhere.json"], "No such file or directory: nowhere.json"),
    (["--gate", "-1"], "gate=-1.0: must be None or a finite number above 0"),
    (["--gate", "nan"], "gate=nan"),
    (["--gate", "much"], "Invalid value for '--gate'"),
    (["--policy", "cfg", "--gate", "0.1"], "gate=0.1 has no effect here"),
    (["--scheduler", "DDIN"], "scheduler='DDIN': allowed are"),
    (["--dtype", "int8"], "dtype='int8': allowed are 'auto', 'float32'"),
    (["--device", "gpu0"], "device='gpu0'"),
    (["--steps", "-3"], "steps=-3: must be an integer from 1"),
    (["--steps", "2.5"], "Invalid value for '--steps'"),
    (["--seed", "-1"], "seed=-1"),
    (["--seed", str(2**63)], "seed="),
    (["--batch-size", "0"], "batch_size=0"),
    (["--images-per-prompt", "0"], "images_per_prompt=0"),
    (["--guidance-scale", "inf"], "guidance_scale=inf"),
    (["--guidance-scale", "1"], "guidance_scale=1: must be above 1 under policy 'dtp'"),
    (["--prompt", " "], "row 2: prompt=' ': must be text that is not empty"),
    (["--prompts", "nowhere.txt"], "give either --prompt, once or more, or --prompts FILE"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_refused_before_the_model_is_loaded(model, no_model, tmp_path, arguments, message):
    out = tmp_path / "out"
    assert message in refused("generate", model, "--prompt", "a cat", "--out", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is no prompt in it"),
        (b"a\n\nb\n", "line 2: prompt='': must be text that is not empty"),
        (b"a\n\xff\n", "line 2: prompt='\\udcff': is not UTF-8 text"),
    ],
)
def test_bad_prompt_files(model, no_model, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert message in refused("generate", model, "--prompts", file, "--out", tmp_path / "out")


def test_no_prompt(model, no_model, tmp_path):
    common = ("generate", model, "--out", tmp_path / "out")
    assert "prompts: give either --prompt" in refused(*common)
    assert "No such file or directory: nowhere.txt" in refused(*common, "--prompts", "nowhere.txt")


def test_bad_policy_files(model, no_model, tmp_path):
    lists = Policy.stack([policy("cfg")] * 2).save(tmp_path / "lists.json")
    steps = policy("dtp", guidance_scale=(7.5, 3.0)).save(tmp_path / "steps.json")
    common = (
        "generate",
        model,
        "--prompt",
        "a cat",
        "--out",
        tmp_path / "out",
        "--steps",
        5,
        "--policy",
    )
    assert "holds per-image lists: must be for one image" in refused(*common, lists)
    assert "has 2 values, must have one per denoiser row: 5 at steps=5" in refused(*common, steps)
    assert "sets its own; give one of the two" in refused(*common, steps, "--guidance-scale", 3)


def test_bad_models(no_model, tmp_path):
    common = ("--prompt", "a cat", "--out", tmp_path / "out")
    assert "no such directory" in refused("generate", tmp_path / "nowhere", *common)
    assert "no pipeline there" in refused("generate", tmp_path, *common)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Nonsense"}')
    assert "'Nonsense' is not one of diffusers'" in refused("generate", tmp_path, *common)


def test_unsupported_pipeline(model, no_model, tmp_path):
    """A class whose arithmetic is not known is refused by its index file, with what is supported."""
    other = tmp_path / "other"
    index = json.loads((model / "model_index.json").read_text())
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyV22Pipeline"}))
    (other / "scheduler").symlink_to(model / "scheduler")
    message = refused("generate", other, "--prompt", "a cat", "--out", tmp_path / "out")
    assert "KandinskyV22Pipeline is not supported" in message
    result = invoke("inspect", other)
    assert result.exit_code == 0
    assert "path       refused: " in result.stdout


def test_other_settings_are_refused(model, tmp_path):
    common = ("generate", model, "--out", tmp_path, "--steps", 1, "--policy")
    assert invoke(*common, "cfg", "--prompt", "a cat").exit_code == 0
    assert 'policy.name is "cfg" there, "dtp" here' in refused(*common, "dtp", "--prompt", "a cat")
    message = refused(*common, "cfg", "--prompt", "a dog")
    assert "id='00000-0': was made in" in message
    assert 'prompt is "a cat" there, "a dog" here' in message
    assert "policy" not in message
    assert 'format is "png" there, "jpeg" here' in refused(*common, "cfg", "--prompt", "a cat", "--format", "jpeg")
    assert invoke(*common, "cfg", "--prompt", "a cat", "--seed", 3).exit_code == 0  # another image beside it
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_bad_directories(model, no_model, tmp_path):
    common = ("generate", model, "--prompt", "a cat", "--out")
    (tmp_path / "file").write_text("mine")
    assert "is a file, must be a directory" in refused(*common, tmp_path / "file")
    assert "is not empty and has no settings.json" in refused(*common, tmp_path)
    assert "Not a directory" in refused(*common, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directory(model, no_model, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused("generate", model, "--prompt", "a cat", "--out", tmp_path / "out")


# inspect, version ----------------------------------------------------------------------------------------------------------


def test_inspect(model):
    result = invoke("inspect", model, "--policy", "stp", "--steps", 50, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["path"], found["family"], found["scheduler"]) == (
        "fused",
        "text-to-image",
        "DDIMScheduler",
    )
    assert (found["form"], found["history"]) == ("epsilon", 0)
    assert 0 <= found["residual"] < 1e-6
    assert (found["denoiser_rows"], found["plain_rows"]) == (75, 100)
    assert [row["denoiser_rows"] for row in found["rows"]] == [1] * 25 + [2] * 25
    assert [row["row"] for row in found["rows"] if row["switch"]] == [25]
    assert found["rows"][25]["timestep"] <= 500 < found["rows"][24]["timestep"]
    assert found["rows"][0]["before"] == 0.0
    assert found["rows"][0]["after"] == 7.5


def test_inspect_says_why(model):
    text = invoke(
        "inspect",
        model,
        "--policy",
        "og+dtp",
        "--scheduler",
        "pndm",
        "--steps",
        10,
        "--guidance-scale",
        4,
    ).stdout
    assert "own step: Runge-Kutta" in text
    text = invoke("inspect", model, "--policy", "og+dtp", "--scheduler", "DPMSolverMultistep", "--steps", 10).stdout
    assert "form x0, lags 1" in text
    assert "deadline at row 4" in text
    assert text.count("<- deadline") == 1
    assert "gate none" in text
    assert "steps=0" in refused("inspect", model, "--steps", 0)


def test_inspect_without_guidance(model):
    """A pipeline runs one branch then: nothing for a guard to do, half of the rows for plain guidance."""
    assert "guidance_scale=1: must be above 1" in refused("inspect", model, "--policy", "dtp", "--guidance-scale", 1)
    found = [
        inspect_model(str(model), policy("cfg"), steps=5, guidance_scale=scale).denoiser_rows for scale in (1.0, 2.0)
    ]
    assert found == [5, 10]


def test_version():
    assert invoke("--version").stdout.strip() == f"fastguard {fastguard.__version__}"


def test_help_names_every_command():
    text = invoke("--help").stdout
    for command in ("generate", "inspect", "demo", "calibrate"):
        assert command in text


# calibrate, demo -----------------------------------------------------------------------------------------------------------


def ordinary(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"a {i}"}) + "\n" for i in range(count)))
    return path


def test_calibrate(model, tmp_path):
    """The file it writes is the policy with the gate that the library finds from the same prompts, and says how it was found."""
    prompts, out = ordinary(tmp_path / "ordinary.jsonl", 8), tmp_path / "guard.json"
    result = invoke(
        "calibrate", "--model", model, "--prompts", prompts, "--out", out, "--policy", "stp", "--fpr", 0.4, "--confidence", 0.9,
        "--seeds", 2, "--steps", 3, "--guidance-scale", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = Policy.load(out)
    assert made == policy("stp", gate=made.gate)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    guard = fastguard.enable(pipe, "cfg")
    largest = []
    for i in range(8):
        pipe(
            [f"a {i}"] * 2,
            generator=pipelines.generators([2 * i, 2 * i + 1]),
            num_inference_steps=3,
            guidance_scale=4,
        )
        largest.append(max(image.rms_curve[0] for image in guard.report))
    # P(Binomial(8, 0.4) = 0) = 0.017, <= 1: 0.106: none may exceed
    assert made.gate == pytest.approx(max(largest), rel=1e-4)
    found = json.loads(out.read_text())["provenance"]
    assert (found["prompts"], found["seeds"], found["fpr"], found["steps"]) == (8, 2, 0.4, 3)
    assert found["statement"] in result.stdout


BAD_CALIBRATIONS = [
    ([], "ordinary.jsonl': fpr=0.01 at confidence=0.95 needs at least 299"),
    (["--fpr", "0"], "fpr=0.0"),
    (["--confidence", "1"], "confidence=1.0"),
    (["--policy", "cfg"], "gate=1.0 has no effect here"),
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
    assert message in refused("calibrate", "--model", model, "--prompts", prompts, "--out", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize("line", ["a cat", '{"text": "a cat"}', '{"prompt": ""}', '["a"]', '{"prompt": 3}'])
def test_bad_jsonl(model, no_model, tmp_path, line):
    file = tmp_path / "ordinary.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    assert "line 2 is not" in refused(
        "calibrate", "--model", model, "--prompts", file, "--out", tmp_path / "guard.json"
    )


def test_calibration_by_groups(model, no_model, tmp_path):
    """Eight prompts of four things are four units: too few for what eight would prove."""
    file = tmp_path / "ordinary.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a {i}", "group": f"thing {i // 2}"}) + "\n" for i in range(8)))
    options = ("calibrate", "--model", model, "--prompts", file, "--out", tmp_path / "guard.json", "--fpr", 0.4)
    assert "4 ordinary groups of prompts in" in refused(*options)
    for line in (
        {"prompt": "a", "group": "a"},
        {"prompt": "b"},
        {"prompt": "b", "group": 3},
        {"prompt": "b", "group": ""},
    ):
        file.write_text('{"prompt": "a", "group": "a"}\n' + json.dumps(line) + "\n")
        assert "line 2" in refused(*options)


def test_demo(monkeypatch, tmp_path):
    module = type(sys)("fastguard.testbed.demo")
    module.run_demo = lambda out: [out / "index.html"]
    monkeypatch.setitem(sys.modules, "fastguard.testbed.demo", module)
    result = invoke("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "demo" / "index.html")
    assert (tmp_path / "demo").is_dir()


def test_the_embedded_model_has_a_guidance_scale_of_its_own():
    plain, scaled = policy("dtp", gate=0.1), policy("dtp", gate=0.1, guidance_scale=5.0)
    assert cli._scale(None, plain, "testbed") == testbed.GUIDANCE_SCALE == 3.0
    assert cli._scale(2.0, plain, "testbed") == 2.0
    assert cli._scale(None, scaled, "testbed") is None  # the policy says it
    assert cli._scale(None, plain, "owner/name") is None
