"""`fastguard inspect`, `--version` and `--help`."""

from __future__ import annotations

import json
import re

import pytest

import fastguard
from fastguard.commands.inspection import as_text, inspect_model
from fastguard.policies.presets import policy
from tests.commands.invoking import invoke, refused
from tests.families.tiny import CASES


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
        inspect_model(str(model), policy("cfg"), steps=5, guidance_scale=scale)["denoiser_rows"] for scale in (1.0, 2.0)
    ]
    assert found == [5, 10]


def test_inspect_shows_the_scale_that_is_used(model, tmp_path):
    own = policy("dtp", guidance_scale=3.0, gate=0.1).save(tmp_path / "own.json")
    assert "guidance scale 3 (the policy's)" in invoke("inspect", model, "--policy", own).stdout
    by_row = policy("dtp", guidance_scale=(2.0, 3.0, 4.0)).save(tmp_path / "rows.json")
    assert "guidance scale 2 to 4, by row" in invoke("inspect", model, "--policy", by_row, "--steps", 3).stdout
    assert {r["after"] for r in inspect_model(str(model), policy("cfg"), steps=3, guidance_scale=-3.0)["rows"]} == {1.0}
    assert "steps=3: PNDMScheduler refuses" in refused("inspect", model, "--scheduler", "PNDM", "--steps", 3)


def test_inspect_anchored():
    """Nothing is switched and nothing holds before: images are anchored from the first row on, at one scale."""
    text = invoke("inspect", "testbed").stdout
    assert re.search(r"^policy +testbed, anchored, gate 0\.\d+, guidance scale 3\n", text, re.MULTILINE)
    assert "deadline" not in text and "switch" not in text and "transition" not in text
    rows = text.partition("g after\n")[2].splitlines()
    assert len(rows) == 50 and all(row.split()[-2:] == ["-", "3"] for row in rows)
    found = inspect_model("testbed", policy("anchored"), steps=5, guidance_scale=4.0)
    assert found["switch_row"] is None and not any(row["switch"] for row in found["rows"])
    assert {(row["before"], row["after"]) for row in found["rows"]} == {(None, 4.0)}
    both = inspect_model("testbed", policy("stp", anchored=True), steps=5)
    assert both["switch_row"] is not None and both["rows"][0]["before"] == 0.0
    assert "stp, anchored, transition static" in as_text(both)


def test_version():
    assert invoke("--version").stdout.strip() == f"fastguard {fastguard.__version__}"


def test_help_names_every_command():
    text = invoke("--help").stdout
    for command in ("generate", "inspect", "demo", "calibrate"):
        assert command in text


@pytest.mark.parametrize(
    ("options", "said"),
    [((), None), (("--steps", 25), "steps 50, not 25"), (("--scheduler", "PNDM"), "DDIMScheduler, not PNDM")],
)
def test_a_gate_of_a_file_used_elsewhere_is_told(options, said):
    """The embedded model's own policy file says what its gate was calibrated with; a gate of one's own is nobody's business."""
    told = invoke("inspect", "testbed", *options).stderr
    assert (said is None and "calibrated" not in told) or said in told
    assert "calibrated" not in invoke("inspect", "testbed", *options, "--gate", 0.05).stderr


def test_what_is_drawn_is_what_the_pipeline_would_draw(model):
    """Its eta is 0; the scheduler's own default is 0.3."""
    found = json.loads(invoke("inspect", model, "--scheduler", "TCD", "--steps", 8, "--json").stdout)
    assert found["noise_draws"] == 0


def test_a_probe_says_what_the_loop_does(model):
    text = invoke("inspect", model, "--policy", "cfg", "--steps", 3, "--guidance-scale", 4, "--probe").stdout
    assert "probe      text-to-image: one batch [u, c], guidance_scale: agrees with the loop" in text
    assert text.count("e = -3 u + 4 c   linear") == 3
    found = json.loads(invoke("inspect", model, "--policy", "cfg", "--steps", 3, "--probe", "--json").stdout)
    assert [row["cond"] for row in found["probe"]["rows"]] == pytest.approx([7.5] * 3)


@pytest.mark.parametrize(
    ("name", "scale", "rows"), [("flux", "true_cfg_scale", [2, 1, 2]), ("sana", "guidance_scale", [2] * 3)]
)
def test_pipelines_that_combine_themselves(name, scale, rows, tmp_path):
    """Their own argument for the scale; a call is left out from the second row on, where there are two."""
    CASES[name].make().save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path), policy("stp"), steps=3, guidance_scale=4.0, scheduler="UniPCMultistep")
    assert (found["path"], found["scale"]) == ("own combination", scale)
    assert [row["denoiser_rows"] for row in found["rows"]] == rows
    with pytest.raises(ValueError, match=f"{scale}=1: must be above 1"):
        inspect_model(str(tmp_path), policy("stp"), steps=3, guidance_scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["cfg", "stp"])
def test_a_probe_needs_a_scale_that_guides(chosen, tmp_path):
    """Flux's own default is true_cfg_scale=1, at which no second branch runs: under `cfg` that is enough for a plan, not for a probe."""
    CASES["flux"].make().save_pretrained(tmp_path)
    assert "true_cfg_scale=1: must be above 1" in refused(
        "inspect", tmp_path, "--policy", chosen, "--steps", 2, "--probe"
    )
    if chosen == "cfg":
        assert invoke("inspect", tmp_path, "--policy", chosen, "--steps", 2).exit_code == 0
