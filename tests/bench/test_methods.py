"""The interface: stock's numbers, rows counted for real, every method from the same noise, the pipeline left as it was."""

from __future__ import annotations

import json
import re

import pytest
import torch

import fastguard
from bench.methods import Compiled, Preset, methods
from tests import pipelines

PROMPTS = ["a red apple", "two dogs"]
NAMES = [name for name in methods() if name != "compile"]


def stock(pipe, steps=5, **arguments):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    arguments = {"guidance_scale": 7.5, "generator": generators, "output_type": "latent", **arguments}
    return pipe(PROMPTS, num_inference_steps=steps, **arguments).images


def test_none_is_stock(pipe, generate):
    made = generate(methods()["none"](), PROMPTS)
    assert torch.equal(made.latents, stock(pipe))
    assert made.rows == 2 * 2 * 5 and made.details == [{}, {}]


def test_cfg_is_stock_with_a_report(pipe, generate):
    made, want = generate(methods()["cfg"](), PROMPTS), stock(pipe)
    # 1e-4 of the largest value, as the project promises for float32.
    torch.testing.assert_close(made.latents, want, rtol=0, atol=1e-4 * want.abs().max().item())
    assert made.rows == 2 * 2 * 5
    assert [len(one["d_curve"]) for one in made.details] == [5, 5]


@pytest.mark.parametrize("name", ["dtp", "og+stp-gated", "embedded-policy"])
def test_a_preset_is_its_policy(pipe, generate, name):
    source = fastguard.testbed.policy_path() if name == "embedded-policy" else name.removesuffix("-gated")
    gate = {"gate": fastguard.policy(fastguard.testbed.policy_path()).gate} if name.endswith("-gated") else {}
    with fastguard.enable(pipe, source, **gate) as guard:
        want, report = stock(pipe), guard.report
    made = generate(methods()[name](), PROMPTS)
    assert torch.equal(made.latents, want)
    assert made.rows == sum(image.denoiser_rows for image in report)
    assert [one["d_curve"] for one in made.details] == [list(image.d_curve) for image in report]


def test_a_gate_of_the_users_own(generate):
    closed = generate(methods(gate=1e6)["dtp-gated"](), PROMPTS)
    assert torch.equal(closed.latents, generate(methods()["cfg"](), PROMPTS).latents)
    assert [one["gate"]["threshold"] for one in closed.details] == [1e6, 1e6]


@pytest.mark.parametrize("name", NAMES)
def test_every_method(pipe, generate, monkeypatch, name):
    """Same noise as stock; details are JSON, one per image; the pipeline is as before; a second call gives the same."""
    before, processors = dict(pipe.__dict__), dict(pipe.unet.attn_processors)
    inputs, forward = [], pipe.unet.forward

    def watch(sample, *args, **kwargs):
        inputs.append(sample.detach())
        return forward(sample, *args, **kwargs)

    first = generate(methods()[name](), PROMPTS)
    monkeypatch.setattr(pipe.unet, "forward", watch)
    again = generate(methods()[name](), PROMPTS)
    monkeypatch.undo()
    assert first.rows == sum(len(sample) for sample in inputs) > 0
    assert torch.equal(first.latents, again.latents) and first.latents.dtype == torch.float32
    assert len(first.details) == 2 and json.loads(json.dumps(first.details, allow_nan=False)) == first.details
    assert {key: pipe.__dict__[key] for key in before if not key.startswith("_")} == {
        key: value for key, value in before.items() if not key.startswith("_")
    }
    assert dict(pipe.unet.attn_processors) == processors and type(pipe) is fastguard.testbed.load().__class__
    assert not pipe.unet._forward_pre_hooks
    monkeypatch.setattr(pipe.unet, "forward", watch)
    inputs.clear()
    stock(pipe, steps=1)
    noise = inputs[0][:2]  # DDIM does not scale its input
    inputs.clear()
    generate(methods()[name](), PROMPTS)
    assert all(any(torch.equal(row, start) for sample in inputs for row in sample) for start in noise)


def test_arguments_are_checked(pipe, generate):
    none = methods()["none"]()
    with pytest.raises(ValueError, match="one per prompt"):
        generate(none, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(none, PROMPTS, scale=1.0)


@pytest.mark.parametrize(
    "name", [name for name in methods() if name != "none" and not isinstance(methods()[name](), Preset)]
)
def test_other_pipelines_are_refused_clearly(name):
    pipe = pipelines.sdxl()
    with pytest.raises(TypeError, match=f"{re.escape(name)}.*StableDiffusionXLPipeline"):
        methods()[name]()(pipe, ["a"], [torch.Generator()], num_inference_steps=2, guidance_scale=7.5)


def test_compile_runs_the_compiled_unet(pipe, generate, monkeypatch):
    """Without the compiler's minutes: a backend that runs the traced graph as it is."""
    made = generate(Compiled(backend="eager"), PROMPTS)
    want = stock(pipe)
    torch.testing.assert_close(made.latents, want, rtol=0, atol=1e-5 * want.abs().max().item())
    assert made.rows == 2 * 2 * 5
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match="compiler"):
        generate(methods()["compile"](), PROMPTS)
