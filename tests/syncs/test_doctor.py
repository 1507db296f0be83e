"""`fastguard doctor`: the same findings from the command line, from a model's configuration alone."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fastguard.commands.cli import app
from tests import pipelines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(path)
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def test_names_the_lines_of_stock_and_none_of_ours(model):
    result = invoke(model)
    assert result.exit_code == 0, result.output
    stock, guarded = result.stdout.split("\n\n")
    assert "22 x synchronisation" in stock and "scheduling_ddim.py" in stock
    assert guarded.strip().endswith("labelled tensors: no synchronisation, no copy")


def test_json(model):
    stock, guarded = json.loads(invoke(model, "--json", "--scheduler", "ddpm", "--steps", 5).stdout)
    assert stock["scheduler"] == guarded["scheduler"] == "DDPMScheduler"
    assert {line["kind"] for line in stock["lines"]} == {"synchronisation"} and not stock["free"]
    assert guarded["free"] and guarded["guarded"] and guarded["lines"] == []


def test_a_loop_that_waits_exits_with_1(tmp_path):
    pipelines.sd(scheduler=pipelines.ddim(thresholding=True)).save_pretrained(tmp_path)
    result = invoke(tmp_path)
    assert result.exit_code == 1 and "DDIMScheduler" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["/nowhere"], "model='/nowhere'"),
        (["{model}", "--steps", "0"], "steps"),
        (["{model}", "--policy", "none"], "policy"),
        (["{model}", "--scheduler", "none"], "scheduler='none'"),
        (["{model}", "--scheduler", "Amused"], "scheduler='Amused': cannot be made"),
        (["{model}", "--scheduler", "ScoreSdeVe"], "scheduler='ScoreSdeVe': allowed are"),
    ],
)
def test_bad_input_is_refused(model, arguments, error):
    result = invoke(*(argument.format(model=model) for argument in arguments))
    assert result.exit_code == 2 and error in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_no_gpu_run(model):
    result = invoke(model, "--gpu")
    assert result.exit_code == 2 and "gpu: torch finds none here" in result.stderr
