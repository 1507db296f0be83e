"""`fastguard generate` on a tiny random model: what it makes, and that a killed run is resumed."""

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

import fastguard
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from tests import pipelines
from tests.commands.invoking import generating, invoke, refused

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red cat", "two dogs", "a house by the sea"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return image.text


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
    assert set(text) == {"parameters", "fastguard"}
    assert text["parameters"].startswith(
        "two dogs\nNegative prompt: ugly\nSteps: 3, Sampler: EulerDiscrete, CFG scale: 4.0, Seed: 8, "
    )
    assert "Guard: og+dtp, Guard gate: caught at row 0" in text["parameters"]
    report = json.loads((out / "report.json").read_text())
    assert [entry["file"] for entry in report["images"]] == names
    entry = report["images"][3]
    record = {key: value for key, value in entry.items() if key not in ("file", "bytes", "mtime_ns", "sha256")}
    assert json.loads(text["fastguard"]) == record
    assert entry["gate"]["caught"] is True
    assert len(entry["d_curve"]) == 3
    assert Policy.from_dict(json.loads(entry["policy_json"])) == policy("og+dtp", gate=1e-6, guidance_scale=4.0)


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
    assert texts(tmp_path / "00000-0.png")["parameters"].startswith("café ☺\n")
    assert json.loads((tmp_path / "report.json").read_text())["images"][0]["prompt"] == "café ☺"


def test_finished_images_are_kept_and_damaged_ones_made_again(model, tmp_path, monkeypatch):
    command = generating(model, tmp_path, "--steps", 2, "--images-per-prompt", 4, "--batch-size", 1)
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
    monkeypatch.setattr("fastguard.pipelines.loading.load_pipeline", None)  # nothing is missing: no model is loaded
    assert "4 images, 0 of them made now" in invoke(*command).stdout
    assert (tmp_path / "report.json").exists()


@pytest.mark.slow
def test_killed_run_is_resumed(model, tmp_path):
    """SIGKILL at any moment: no image is lost, damaged or made twice, and the end is that of an uninterrupted run."""
    arguments = [
        "--prompt",
        "a cat",
        "--prompt",
        "a dog",
        "--steps",
        25,
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

    command = generating(model, tmp_path, "--steps", 1)
    monkeypatch.setattr("fastguard.files.os.fsync", full)
    assert invoke(*command).exit_code != 0
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.png"))
    assert invoke(*command).exit_code == 0
