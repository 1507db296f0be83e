"""What people switch on besides: truncation, norms, rescale, boundaries, dynamic scales, adapters, caches. Unguarded images keep stock's
bits, zero guidance is stock on the negative prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import types

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

import fastguard
from fastguard.pipelines.families import find
from fastguard.pipelines.probe import probe
from tests.families.every import EVERY
from tests.families.more import picture
from tests.families.tiny import flux_transformer, parts, run, unipc, wan

# (instance, arguments that switch something on, whether both branches run to the end)
VARIANTS = {
    "z-image, clamped norm": ("z-image", {"cfg_normalization": 0.5}, True),
    "z-image, truncated": ("z-image", {"cfg_truncation": 0.2}, False),
    "lumina 2, truncated": ("lumina 2", {"cfg_trunc_ratio": 0.5}, False),
    "ltx, rescaled": ("ltx", {"guidance_rescale": 0.7}, True),
    "hunyuan-dit, rescaled": ("hunyuan-dit text", {"guidance_rescale": 0.7}, True),
    "adapter xl, rescaled": ("adapter xl", {"guidance_rescale": 0.7}, True),
    "wan 2.2, one scale": ("wan 2.2", {"guidance_scale_2": None}, True),
    "wan 2.2, second transformer unguided": ("wan 2.2", {"guidance_scale_2": 1.0}, True),
    "cogvideox, dynamic scale": ("cogvideox, dpm", {"use_dynamic_cfg": True}, True),
}


def _guarded(tiny, pipe, arguments, policy, **overrides):
    with fastguard.enable(pipe, policy, **overrides) as guard:
        return run(tiny, pipe, arguments), guard.report


def _assert_alike(tiny, pipe, on, *, zero=None):
    """Unguarded under every kind of policy; and zero guidance, where it holds to the end."""
    stock = run(tiny, pipe, tiny.guided(**on))
    for policy in ("cfg", "stp", "og+dtp", "anchored"):
        gate = {} if policy == "cfg" else {"gate": 1e3}
        assert torch.equal(_guarded(tiny, pipe, tiny.guided(**on), policy, **gate)[0], stock), policy
    if zero is not None:
        ours, report = _guarded(tiny, pipe, tiny.guided(**on), "stp", t_star=0)
        expected = run(tiny, pipe, zero)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0 if tiny.exact else 2e-6 * expected.abs().max().item())
        return report


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_call_switches_on(variant):
    name, on, whole = VARIANTS[variant]
    tiny, pipe = EVERY[name], EVERY[name].make()
    assert not torch.equal(run(tiny, pipe, tiny.guided(**on)), run(tiny, pipe, tiny.guided()))
    _assert_alike(tiny, pipe, on, zero=tiny.alone(2) if whole else None)
    if not whole:
        with pytest.warns(UserWarning, match="the second branch ended at denoiser row"):
            _guarded(tiny, pipe, tiny.guided(**on), "stp", t_star=0)


@pytest.mark.parametrize("steps", [1, 9])
def test_a_boundary_anywhere(steps):
    tiny = dataclasses.replace(EVERY["wan 2.2"], steps=steps)
    _assert_alike(tiny, tiny.make(), {}, zero=tiny.alone(2))


def test_a_denoiser_that_reads_pictures_before_the_loop():
    """GLM-Image fills its caches so, and shows them to the conditional branch alone: u is what its last call gave."""
    tiny, pipe = EVERY["glm"], EVERY["glm"].make()
    pictures = {
        "image": [[picture()], [picture(1)]],
        "prior_token_image_ids": [torch.arange(4), torch.arange(4, 8)],
        "source_image_grid_thw": [torch.tensor([[1, 2, 2]])] * 2,
    }
    on = {**pictures, "guidance_scale": 4.0}
    assert not torch.equal(run(tiny, pipe, tiny.guided(**on)), run(tiny, pipe, tiny.guided()))
    _assert_alike(tiny, pipe, on)
    assert probe(pipe, tiny.guided(**on), find(type(pipe))).contradictions() == []
    ours, report = _guarded(tiny, pipe, tiny.guided(**on), "stp", t_star=0)
    seen, step = [], pipe.scheduler.step
    pipe.transformer.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    pipe.scheduler.step = lambda e, *rest, **named: step(seen[-1], *rest, **named)
    torch.testing.assert_close(ours, run(tiny, pipe, tiny.guided(**on)), rtol=0, atol=1e-6)
    assert report[0].denoiser_rows == 2 * tiny.steps


def test_a_standard_deviation_over_the_whole_batch():
    """Bria's normalize."""
    tiny, pipe = EVERY["bria"], EVERY["bria"].make()
    on = {"normalize": True}
    assert not torch.equal(run(tiny, pipe, tiny.guided(**on)), run(tiny, pipe, tiny.guided()))
    _assert_alike(tiny, pipe, on)
    assert probe(pipe, tiny.guided(**on), find(type(pipe))).contradictions() == []
    # stock cannot normalize without guidance; the guard's zero guidance is the plain negative branch
    ours, _ = _guarded(tiny, pipe, tiny.guided(**on), "stp", t_star=0)
    torch.testing.assert_close(ours, run(tiny, pipe, tiny.alone(2)), rtol=0, atol=1e-5)


def test_a_timestep_for_each_token():
    """Wan 2.2 TI2V."""
    tiny, pipe = EVERY["wan"], wan(scheduler=unipc)()
    pipe.register_to_config(expand_timesteps=True)
    _assert_alike(tiny, pipe, {}, zero=tiny.alone(2))


def test_an_ip_adapter_that_is_swapped_between_the_calls():
    tiny, pipe = EVERY["flux"], EVERY["flux"].make()
    transformer, generator = pipe.transformer, torch.Generator().manual_seed(3)
    width = transformer.config.joint_attention_dim

    def random(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    projection = {"proj.weight": random(width * 4, 16), "proj.bias": random(width * 4)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    attention = {f"0.to_{one}_ip.weight": random(transformer.inner_dim, width) for one in "kv"}
    attention |= {f"0.to_{one}_ip.bias": random(transformer.inner_dim) for one in "kv"}
    transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": attention}])
    positive, negative = [random(2, 1, 16)], [random(2, 1, 16)]
    on = {"ip_adapter_image_embeds": positive, "negative_ip_adapter_image_embeds": negative}
    off = {"ip_adapter_image_embeds": negative, "negative_ip_adapter_image_embeds": negative}
    report = _assert_alike(tiny, pipe, on, zero=tiny.alone(2, **off))
    assert report[0].denoiser_rows == 2 * tiny.steps and "swaps the IP-Adapter" in report.reason


def _caching(forward):
    """A forward that counts its calls and gives, every second row, what it gave the row before: as TeaCache does."""

    def counting(self, *args, **kwargs):
        call = self.__dict__["calls"] = self.__dict__.get("calls", -1) + 1
        if call // 2 % 2 == 0:
            self.__dict__[f"kept {call % 2}"] = forward(self, *args, **kwargs)
        return self.__dict__[f"kept {call % 2}"]

    return counting


@contextlib.contextmanager
def _class_forward(pipe, patch):
    patch.setattr(diffusers.FluxTransformer2DModel, "forward", _caching(diffusers.FluxTransformer2DModel.forward))
    yield
    patch.undo()


@contextlib.contextmanager
def _object_forward(pipe, patch):
    pipe.transformer.forward = types.MethodType(_caching(type(pipe.transformer).forward), pipe.transformer)
    yield


@contextlib.contextmanager
def _hook(pipe, patch):
    kept = []

    def hook(module, given, output):
        kept.append(output if len(kept) // 2 % 2 == 0 else kept[-2])
        return kept[-1]

    pipe.transformer.transformer_blocks[0].register_forward_hook(hook)
    yield


@contextlib.contextmanager
def _hook_on_the_denoiser(pipe, patch):
    kept = []

    def hook(module, given, output):
        kept.append(output if len(kept) // 2 % 2 == 0 else kept[-2])
        return kept[-1]

    pipe.transformer.register_forward_hook(hook)
    yield


@contextlib.contextmanager
def _forward_over_offload(pipe, patch):
    add_hook_to_module(pipe.transformer, ModelHook())
    caching = _caching(lambda self, *args, _forward=pipe.transformer.forward, **kwargs: _forward(*args, **kwargs))
    pipe.transformer.forward = types.MethodType(caching, pipe.transformer)
    yield


@contextlib.contextmanager
def _first_block(pipe, patch):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5))
    yield


@pytest.mark.parametrize(
    "cache", [_class_forward, _object_forward, _hook, _hook_on_the_denoiser, _forward_over_offload, _first_block]
)
def test_no_call_is_left_out_while_something_remembers_them(cache, monkeypatch):
    tiny = EVERY["flux"]

    def outcome(policy):
        pipe = parts(
            diffusers.FluxPipeline,
            transformer=flux_transformer(num_layers=2, num_single_layers=2),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        )
        with cache(pipe, monkeypatch):
            if policy is None:
                return run(tiny, pipe, tiny.guided())
            return _guarded(tiny, pipe, tiny.guided(), policy)

    assert torch.equal(outcome("cfg")[0], outcome(None))
    held = fastguard.policy("stp", t_star=0)
    (ours, report), (both, _) = outcome(held), outcome(dataclasses.replace(held, monitor=True))
    assert torch.equal(ours, both)
    assert report[0].denoiser_rows == 2 * tiny.steps and "both branches run in every row" in report.reason


def test_a_call_without_a_second_branch_runs_where_that_is_asked_for():
    tiny, pipe = EVERY["wan"], EVERY["wan"].make()
    stock = run(tiny, pipe, tiny.alone(1))
    with fastguard.enable(pipe, "stp", unguided="run") as guard:
        assert torch.equal(run(tiny, pipe, tiny.alone(1)), stock)
        assert "nothing was guarded" in guard.report.reason
        run(tiny, pipe, tiny.guided())
        assert guard.report.reason is None and guard.report[0].policy.name == "stp"


def test_options_for_a_denoiser_that_the_pipeline_runs_are_refused():
    pipe = EVERY["flux"].make()
    for option in ({"compile": True}, {"attention_backend": "native"}):
        with pytest.raises(
            ValueError, match=r"FluxPipeline runs its denoiser itself; set them there \(pipe.transformer"
        ):
            fastguard.enable(pipe, "cfg", **option)
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        run(EVERY["flux"], pipe, EVERY["flux"].guided())
    assert guard.report.reason == "capture='step' became 'off': the pipeline runs its denoiser itself"


def test_latents_that_a_callback_cuts_are_refused():
    """Also where the pipeline combines the branches itself."""
    tiny, pipe = EVERY["wan"], EVERY["wan"].make()

    def callback(pipe, row, timestep, given):
        return {"latents": given["latents"][..., : given["latents"].shape[-1] // 2]}

    with fastguard.enable(pipe, "cfg"), pytest.raises(ValueError, match=r"latents became .* that began with"):
        run(tiny, pipe, tiny.guided(), callback_on_step_end=callback)
