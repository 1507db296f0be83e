"""The interface: stock's numbers, rows counted for real, every method from the same noise, the pipeline left as it was."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

import fastguard
from bench.methods import Compiled, Preset, methods, reference, somepalli
from tests import pipelines

PROMPTS = ["a red apple", "two dogs"]
ANYWHERE = ("none", "han-batch", "han-sample", "first-look")  # on Stable Diffusion XL, too
NAMES = [name for name in methods() if name not in ("compile", "han-sample")]  # han-sample: a thousand steps


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


def test_a_policy_file_with_and_without_its_gate(tmp_path):
    file = fastguard.policy("og+stp", gate=0.25).save(tmp_path / "mine.json")
    found = methods(policy=file)
    assert "embedded-policy" not in found and found["dtp-gated"]().policy.gate == 0.25
    assert found["policy"]().policy == fastguard.policy(file)
    assert found["policy-ungated"]().policy == dataclasses.replace(fastguard.policy(file), gate=None)


def test_a_gate_of_the_users_own(generate):
    closed = generate(methods(gate=1e6)["dtp-gated"](), PROMPTS)
    assert torch.equal(closed.latents, generate(methods()["cfg"](), PROMPTS).latents)
    assert [one["gate"]["threshold"] for one in closed.details] == [1e6, 1e6]


PUBLISHED = {  # what the papers and the released code have; the first two of Wen are the embedded model's
    "wen-0.2": {"target": 0.2, "lr": 0.05, "iterations": 10},
    "wen-0.5": {"target": 0.5, "lr": 0.05, "iterations": 10},
    "wen-1": {"target": 1.0, "lr": 0.05, "iterations": 10},
    "wen-3": {"target": 3.0, "lr": 0.05, "iterations": 10},
    "ren": {"c1": 1.25},
    "random-numbers": {"kind": "numbers", "count": 4},
    "random-words": {"kind": "words", "count": 4},
    "word-repeat": {"kind": "repeat", "count": 4},
    "embedding-noise": {"strength": 0.1, "on": ("u", "c")},
    "interval": {"low": 0.28, "high": 5.42},
    "reference-dtp": {"before": 1.0},
    "reference-stp": {"t_star": 500.0, "before": 0.0},
    "reference-og+stp": {"t_star": 650.0, "before": -2.0},
    "reference-og+dtp": {},
    "han-batch": {"updates": 2, "rho": 50.0, "gamma": 0.7, "without": 5},
    "han-sample": {"target": 0.9, "lr": 0.01, "iterations": 1000},
    "padding-swap": {"filler": "!"},
    "padding-mask": {"share": 0.7},
    "first-look": {},
    "compile": {"options": {}},
}


def test_the_peers_have_their_published_parameters():
    peers = {name: factory() for name, factory in methods().items() if not isinstance(factory(), Preset)}
    found = {
        name: {key: value for key, value in vars(peer).items() if key != "name" and not key.startswith("_")}
        for name, peer in peers.items()
    }
    assert found == {"none": {}, **PUBLISHED}
    assert all(peer.name == name for name, peer in peers.items())
    assert (somepalli.LARGEST_NUMBER, somepalli.TOKENS) == (99_999, 49_400)
    assert (reference.FALLBACK, reference.FINER) == (5, 4)


@pytest.mark.parametrize(
    ("name", "before", "transition", "t_star", "deadline"),
    [
        ("cfg", "none", "none", None, False),
        ("stp", "zero", "static", 500.0, False),
        ("og+stp", -2.0, "static", 650.0, False),
        ("dtp", "zero", "dynamic", None, True),
        ("og+dtp", "opposite", "dynamic", None, True),
        ("paper-dtp", "zero", "dynamic", None, False),
        ("paper-og+dtp", "opposite", "dynamic", None, False),
        ("released-dtp", "conditional", "dynamic", None, False),
    ],
)
def test_the_presets_are_the_papers(name, before, transition, t_star, deadline):
    policy = methods()[name]().policy
    assert policy.guarded is (name != "cfg") and policy.gate is None
    if policy.guarded:
        assert (policy.before, policy.transition, policy.t_star) == (before, transition, t_star)
        assert (policy.deadline is not None) is deadline and policy.rule == "minimum"
        gated = methods(gate=0.5)[f"{name}-gated"]().policy
        assert gated == dataclasses.replace(policy, gate=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_every_method(pipe, generate, name):
    """Same noise as stock; details are JSON, one per image; the pipeline is as before; a second call gives the same."""
    before, processors = dict(pipe.__dict__), dict(pipe.unet.attn_processors)
    inputs = []

    def watch(module, args, kwargs):
        inputs.append((args[0] if args else kwargs["sample"]).detach())

    watch.only_looks = True
    first = generate(methods()[name](), PROMPTS)
    handle = pipe.unet.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        again = generate(methods()[name](), PROMPTS)
    finally:
        handle.remove()
    assert first.rows == sum(len(sample) for sample in inputs) > 0
    assert torch.equal(first.latents, again.latents) and first.latents.dtype == torch.float32
    assert len(first.details) == 2 and json.loads(json.dumps(first.details, allow_nan=False)) == first.details
    assert {key: pipe.__dict__[key] for key in before if not key.startswith("_")} == {
        key: value for key, value in before.items() if not key.startswith("_")
    }
    assert dict(pipe.unet.attn_processors) == processors and type(pipe) is fastguard.testbed.load().__class__
    assert not pipe.unet._forward_pre_hooks
    handle = pipe.unet.register_forward_pre_hook(watch, with_kwargs=True)
    inputs.clear()
    try:
        stock(pipe, steps=1)
        noise = inputs[0][:2]  # DDIM does not scale its input
        inputs.clear()
        generate(methods()[name](), PROMPTS)
    finally:
        handle.remove()
    assert all(any(torch.equal(row, start) for sample in inputs for row in sample) for start in noise)


def test_arguments_are_checked(pipe, generate):
    none = methods()["none"]()
    with pytest.raises(ValueError, match="one per prompt"):
        generate(none, PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match="guidance_scale"):
        generate(none, PROMPTS, scale=1.0)


@pytest.mark.parametrize(
    "name", [name for name in methods() if name not in ANYWHERE and not isinstance(methods()[name](), Preset)]
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
