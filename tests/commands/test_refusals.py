"""What `fastguard generate` refuses, before any work, and how each failure ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys

import pytest

from fastguard.batch.task import Interrupted
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests.commands.invoking import invoke, refused


def test_exit_codes(model, tmp_path, monkeypatch):
    command = ("generate", model, "--prompt", "a cat", "--out", tmp_path, "--steps", 1, "--policy", "cfg")
    errors = {
        143: Interrupted(signal.SIGTERM),
        130: Interrupted(signal.SIGINT),
        1: OSError(28, "No space left on device"),
    }
    for code, error in errors.items():

        def run(self, progress, error=error):
            raise error

        monkeypatch.setattr("fastguard.batch.job.Job.run", run)
        result = invoke(*command)
        assert result.exit_code == code
        assert "resumes" in result.stderr


BAD = [
    (["--policy", ""], "policy='': is empty (an unset shell variable?)"),
    (["--policy", " "], "policy=' ': is empty"),
    (["--policy", "dpt"], "policy='dpt': allowed are cfg"),
    (["--policy", "nowhere.json"], "No such file or directory: nowhere.json"),
    (["--gate", "-1"], "gate=-1.0: must be None or a finite number above 0"),
    (["--gate", "nan"], "gate=nan"),
    (["--gate", "much"], "Invalid value for '--gate'"),
    (["--policy", "cfg", "--gate", "0.1"], "gate=0.1 has no effect here"),
    (["--scheduler", "DDIN"], "scheduler='DDIN': allowed are"),
    (["--scheduler", "FlowMatchEulerDiscrete"], "FlowMatchEulerDiscreteScheduler has no init_noise_sigma"),
    (
        ["--scheduler", "IPNDM", "--policy", "stp"],
        "t_star=500 counts training steps, which this scheduler's timesteps do not",
    ),
    (["--scheduler", "RePaint"], "RePaintScheduler wants original_image at every step"),
    (
        ["--scheduler", "VQDiffusion"],
        "scheduler='VQDiffusionScheduler': cannot be made from this model's configuration",
    ),
    (["--dtype", "int8"], "dtype='int8': allowed are 'auto', 'float32'"),
    (["--device", "gpu0"], "device='gpu0'"),
    (["--steps", "-3"], "steps=-3: must be an integer from 1"),
    (["--steps", "2.5"], "Invalid value for '--steps'"),
    (["--seed", "-1"], "seed=-1"),
    (["--seed", str(2**63)], "seed="),
    (["--batch-size", "0"], "batch_size=0"),
    (["--images-per-prompt", "0"], "images_per_prompt=0"),
    (["--guidance-scale", "inf"], "guidance_scale=inf"),
    (["--guidance-scale", "1"], "guidance_scale=1: must be above 1 under policy 'anchored'"),
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
        (b"\n \n", "there is no prompt in it"),
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
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPAGPipeline"}))
    (other / "scheduler").symlink_to(model / "scheduler")
    message = refused("generate", other, "--prompt", "a cat", "--out", tmp_path / "out")
    assert "StableDiffusionPAGPipeline is not supported" in message
    result = invoke("inspect", other)
    assert result.exit_code == 0
    assert "path       refused: " in result.stdout


def test_a_distilled_unet_is_refused_before_work(model, no_model, tmp_path):
    """LCM-distilled models take the scale as an input: there is no unconditional branch to hold back."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({**config, "time_cond_proj_dim": 8}))
    out = tmp_path / "out"
    assert "time_cond_proj_dim" in refused("generate", other, "--prompt", "a cat", "--out", out)
    assert not out.exists()
    assert "path       refused: its UNet takes the guidance scale" in invoke("inspect", other).stdout
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i} cats"}}\n' for i in range(300)))
    assert "time_cond_proj_dim" in refused("calibrate", other, "--prompts", prompts, "--out", tmp_path / "policy.json")


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
    assert "file: is a file, must be a directory" in refused(*common, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directory(model, no_model, tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refused("generate", model, "--prompt", "a cat", "--out", tmp_path / "out")


def test_rejected_rows_have_an_exit_code_of_their_own(model, tmp_path):
    """What was made is summed up, and what was not is named."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "id": "good"}\n{"prompt": "", "id": "bad"}\n{"prompt": "b", "seed": -1}\n')
    command = ("generate", model, "--prompts", rows, "--out", tmp_path / "out", "--steps", 1, "--policy", "cfg")
    assert "2 bad rows, nothing was done" in refused(*command)
    result = invoke(*command, "--keep-going", "-q")
    assert result.exit_code == 3, result.output
    assert "1 images, 1 of them made now" in result.stdout
    assert "rejected rows: 2 (bad)" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["rejected"], report["rejected_ids"]) == (2, ["bad"])


@pytest.mark.parametrize(
    ("name", "module", "arguments"),
    [
        ("ray", "ray", ("--engine", "ray")),
        ("parquet", "pyarrow", ("--prompts", "p.parquet")),
    ],
)
def test_missing_extras(model, no_model, tmp_path, monkeypatch, name, module, arguments):
    """One line with the command that installs them, before any work."""
    monkeypatch.setitem(sys.modules, module, None)
    prompt = () if "--prompts" in arguments else ("--prompt", "a")
    message = refused("generate", model, *prompt, "--out", tmp_path / "out", "--policy", "cfg", *arguments)
    assert message.endswith(f"needs {module}; pip install 'diffusers-fastguard[{name}]'")
    assert not (tmp_path / "out").exists()


def test_the_demo_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused("demo", "--out", tmp_path / "demo")
    assert message == "error: demo: needs matplotlib; pip install 'diffusers-fastguard[plot]'"
    assert not (tmp_path / "demo").exists()


def test_messages(model, tmp_path):
    """Of our logger alone, and of none with -q."""
    command = ("generate", model, "--prompt", "a", "--steps", 1, "--policy", "stp", "--device", "cpu", "--out")
    assert invoke(*command, tmp_path / "loud").stderr.startswith("WARNING: policy 'stp' has no gate")
    result = invoke(*command, tmp_path / "quiet", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
