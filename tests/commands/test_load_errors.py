"""Models that cannot be loaded: one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastguard.commands.inspection import inspect_model
from fastguard.policies.presets import policy
from tests.commands.invoking import invoke, refused


@pytest.fixture
def broken(model, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def only_variant(model: Path) -> None:
    for path in model.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))


def one_variant(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".fp16.safetensors"))


def cut(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_shape(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = torch.zeros(1, 1, 3, 3)
    save_file(weights, path)


def no_checker(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (only_variant, "has weights of variant 'fp16' alone: give variant"),
        (one_variant, "unet has weights of variant 'fp16' alone: give variant"),
        (cut, "cannot be loaded: "),
        (other_shape, "cannot be loaded: "),
        (no_checker, "cannot be loaded: "),
        (lambda model: shutil.rmtree(model / "text_encoder"), "cannot be loaded: "),
        (lambda model: shutil.rmtree(model / "scheduler"), "has no scheduler directory"),
        (lambda model: (model / "unet" / "config.json").write_text("{"), "its unet cannot be read: "),
        (
            lambda model: (model / "scheduler" / "scheduler_config.json").write_text("{"),
            "its scheduler cannot be read: ",
        ),
    ],
    ids=[
        "variant",
        "variant of a part",
        "cut weights",
        "shape",
        "safety checker",
        "text encoder",
        "scheduler",
        "unet's json",
        "scheduler's json",
    ],
)
def test_a_model_that_cannot_be_loaded(broken, tmp_path, breaks, message):
    breaks(broken)
    result = invoke(
        "generate", broken, "--prompt", "a", "--policy", "cfg", "--out", tmp_path / "out", "--device", "cpu"
    )
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"model='{broken}'" in errors[0] and message in errors[0]
    assert "resumes" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_variant_can_be_asked_for(broken, tmp_path):
    only_variant(broken)
    options = ("--prompt", "a", "--policy", "cfg", "--steps", 1, "--variant", "fp16", "--device", "cpu")
    result = invoke("generate", broken, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output


def test_a_scheduler_that_does_not_fit(broken, tmp_path):
    """Each refuses in its own way (NotImplementedError here): one line, of generate and of inspect."""
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_schedule": "laplace"}))
    path.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "unheard-of"}))
    for command in (("generate", broken, "--prompt", "a", "--out", tmp_path / "out"), ("inspect", broken)):
        assert "its scheduler cannot be read: " in refused(*command)
    path.write_text(
        json.dumps(
            {
                "_class_name": "DDIMScheduler",
                "beta_schedule": "scaled_linear",
                "trained_betas": None,
                "solver_type": "nowhere",
            }
        )
    )
    message = refused("inspect", broken, "--scheduler", "DPMSolverMultistep")
    assert "scheduler='DPMSolverMultistep': cannot be made from this model's configuration" in message
    assert not (tmp_path / "out").exists()


def test_inspect_shows_what_the_pipeline_builds(broken, tmp_path):
    """A pipeline repairs an outdated scheduler (clip_sample): it runs fused, and inspect says so."""
    path = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    outdated = {key: value for key, value in config.items() if key not in ("clip_sample", "steps_offset")}
    path.write_text(json.dumps(outdated | {"clip_sample": True, "steps_offset": 0}))
    built = diffusers.StableDiffusionPipeline.from_pretrained(broken).scheduler.config
    assert (built.clip_sample, built.steps_offset) == (False, 1)
    found = inspect_model(str(broken), policy("stp"), steps=10)
    assert found["path"] == "fused"
    scheduler = diffusers.DDIMScheduler.from_config(built)
    scheduler.set_timesteps(10)
    assert [row["timestep"] for row in found["rows"]] == scheduler.timesteps.tolist()
