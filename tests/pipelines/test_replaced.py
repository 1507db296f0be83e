"""What somebody replaces around a guarded pipeline: its class's call, its denoiser, the size of its latents."""

from __future__ import annotations

import functools
import gc
import weakref

import diffusers
import pytest
import torch

import fastguard
from tests import pipelines
from tests.guarded import STEPS, call, picture

KIND = diffusers.StableDiffusionPipeline


def counting(function, calls, wrapped=True):
    def __call__(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return functools.wraps(function)(__call__) if wrapped else __call__


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_class_patched_after_enable_is_followed_and_forgotten(monkeypatch, wrapped):
    pipe, calls = pipelines.sd(), []
    with fastguard.enable(pipe, "cfg"):
        plain = call(pipe)
        with monkeypatch.context() as patch:
            patch.setattr(KIND, "__call__", counting(KIND.__call__, calls, wrapped))
            assert torch.equal(call(pipe), plain) and len(calls) == 1
        assert torch.equal(call(pipe), plain) and len(calls) == 1


def test_a_wrapper_that_names_no_arguments_on_sdxl_controlnet(monkeypatch):
    """This pipeline reads its guidance scale from its argument, which such a wrapper hides."""
    kind, calls = diffusers.StableDiffusionXLControlNetPipeline, []
    pipe = pipelines.sdxl("StableDiffusionXLControlNetPipeline")
    arguments = {"image": [picture(), picture(seed=1)]}
    with fastguard.enable(pipe, "cfg"):
        plain = call(pipe, **arguments)
        monkeypatch.setattr(kind, "__call__", counting(kind.__call__, calls, wrapped=False))
        assert torch.equal(call(pipe, **arguments), plain) and calls
    with fastguard.enable(pipe, "cfg"), pytest.raises(TypeError, match=r"names no arguments .*use functools\.wraps"):
        call(pipe, **arguments)


def test_gradients_through_the_wrapped_call_are_refused_in_words():
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg"), pytest.raises(RuntimeError, match="gradients through a guarded call"):
        type(pipe).__call__.__wrapped__(pipe, "a cat")


@pytest.mark.parametrize("value", ["none", "another"])
def test_a_denoiser_that_the_pipeline_gives_up_is_given_up(value):
    pipe, other = pipelines.sd(), pipelines.sd().unet
    with fastguard.enable(pipe, "cfg"):
        call(pipe)
        gone = weakref.ref(pipe.unet)
        pipe.unet = None if value == "none" else other
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("change", ["half the size", "one image less"])
def test_latents_of_another_shape_are_refused_in_words(change):
    def callback(pipe, step, timestep, values):
        latents = values["latents"]
        if step == 1:
            latents = latents[:, :, ::2, ::2] if change == "half the size" else latents[:1]
        return {"latents": latents.contiguous()}

    pipe = pipelines.sd()
    with (
        fastguard.enable(pipe, "cfg"),
        pytest.raises(ValueError, match=r"latents became .* in a guarded call that began with"),
    ):
        call(pipe, callback_on_step_end=callback)


@pytest.mark.parametrize("scheduler", [pipelines.ddim, lambda: diffusers.EulerDiscreteScheduler(**pipelines.BETAS)])
def test_image_to_image_without_a_step(scheduler):
    """strength * steps < 1: stock runs no row and decodes what it was given."""
    pipe = pipelines.sd("StableDiffusionImg2ImgPipeline", scheduler())
    arguments = {"image": picture(), "strength": 0.1, "num_inference_steps": STEPS}
    try:
        stock = call(pipe, **arguments)
    except Exception as error:
        with fastguard.enable(pipe, "cfg"), pytest.raises(type(error)):
            call(pipe, **arguments)
        return
    with fastguard.enable(pipe, "cfg") as guard:
        assert torch.equal(call(pipe, **arguments), stock)
        assert guard.report is None


def test_without_guidance_a_guard_raises_or_runs_at_the_users_word():
    pipe = pipelines.sd()
    stock = call(pipe, guidance_scale=1.0)
    with fastguard.enable(pipe, "dtp", gate=0.1), pytest.raises(ValueError, match="unguided='run'"):
        call(pipe, guidance_scale=1.0)
    with fastguard.enable(pipe, "dtp", gate=0.1, unguided="run") as guard:
        ours = call(pipe, guidance_scale=1.0)
        assert "nothing was guarded" in guard.report.reason
        assert guard.report[0].policy.name == "cfg"
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())
    with pytest.raises(ValueError, match="unguided='maybe': allowed are 'raise', 'run'"):
        fastguard.enable(pipe, "dtp", unguided="maybe")
