"""The code on the first pages runs as it stands and gives stock's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastguard
from bench.api_page import page
from fastguard import testbed

ROOT = Path(__file__).resolve().parents[1]


def snippet(page: str) -> str:
    """The first block of Python of a page."""
    return re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]


def test_the_loop_on_one_screen_is_the_pipeline_s():
    pipe, prompts, scale = testbed.load(), ["a dog", "crab icon"], 3.0
    latents = torch.randn(2, 8, 8, 8, generator=torch.manual_seed(0))
    stock = pipe(prompts, latents=latents, num_inference_steps=6, guidance_scale=scale, output_type="latent").images
    cond, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
    pipe.scheduler.set_timesteps(6)
    names = {
        "scheduler": pipe.scheduler,
        "policies": [fastguard.policy("cfg")] * 2,
        "guidance_scale": scale,
        "elements": latents[0].numel(),
        "latents": latents,
        "denoiser": lambda x, t, text: pipe.unet(x, t, encoder_hidden_states=text).sample,
        "text": torch.cat([uncond, cond]),
    }
    with torch.no_grad():
        exec(snippet("docs/architecture.md"), names)
    torch.testing.assert_close(names["loop"].x, stock, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_first_snippet(tmp_path, monkeypatch, capsys):
    """Calibrated on the 65 ordinary tuning prompts: the watch is ordinary, the crab memorized."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet("README.md"), names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["False", "True"]
    saved = fastguard.policy("policy.json")
    assert saved.gate == names["gate"].threshold and names["gate"].fpr == 0.05
    assert saved.provenance == {"model": "testbed", "scheduler": "DDIMScheduler", "dtype": "float32", "steps": 50}
    assert type(names["pipe"]).__call__ is type(testbed.load()).__call__ and len(names["images"]) == 2


def test_the_api_page_is_current():
    assert (ROOT / "docs" / "api.md").read_text() == page(), "python -m bench.api_page"
