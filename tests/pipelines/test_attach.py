"""Attaching the guard and taking it off: identity, copies, hooks of others, failures in the middle of a call."""

from __future__ import annotations

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import fastguard
from tests import pipelines
from tests.guarded import STEPS, call, same


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def test_identity_of_an_enabled_pipeline(sd, tmp_path):
    base, unet, scheduler = type(sd), sd.unet, sd.scheduler
    forward, before = unet.forward, dict(vars(scheduler))
    guard = fastguard.enable(sd, "cfg")
    assert type(sd) is not base and isinstance(sd, base)
    assert (type(sd).__name__, type(sd).__module__) == (base.__name__, base.__module__)
    assert inspect.signature(type(sd).__call__) == inspect.signature(base.__call__)
    call(sd)
    assert sd.unet is unet and sd.scheduler is scheduler and unet.forward == forward
    assert type(unet).__call__ is torch.nn.Module.__call__ and set(vars(scheduler)) == set(before)
    sd.save_pretrained(tmp_path)
    assert fastguard.enable(sd, "cfg") is guard
    guard.disable()
    assert type(sd) is base and "_fastguard_guard" not in vars(sd)
    guard.disable()  # twice does no harm

    loaded = base.from_pretrained(tmp_path, safety_checker=None)
    assert type(loaded) is base
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), call(sd))


def test_from_pipe_copies_and_pickles_are_stock(sd):
    with fastguard.enable(sd, "cfg"):
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(sd)
        assert type(other) is diffusers.StableDiffusionImg2ImgPipeline and other.unet is sd.unet
        twin = copy.deepcopy(sd)
        assert type(twin) is diffusers.StableDiffusionPipeline and "_fastguard_guard" not in vars(twin)
        auto = diffusers.AutoPipelineForInpainting.from_pipe(sd)
        assert type(auto) is diffusers.StableDiffusionInpaintPipeline
    assert torch.equal(call(twin), call(sd))


def test_pickle_is_stock():
    pipe = pipelines.sd()  # never called: transformers hangs hooks on a called text encoder that no pickle takes
    with fastguard.enable(pipe, "cfg"):
        loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is diffusers.StableDiffusionPipeline and "_fastguard_guard" not in vars(loaded)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), call(pipe))


def test_environment_variable_switches_off(sd, monkeypatch):
    stock = call(sd)
    with fastguard.enable(sd, "stp") as guard:
        call(sd)
        assert guard.report is not None
        monkeypatch.setenv("FASTGUARD_DISABLE", "1")
        assert torch.equal(call(sd), stock)
        assert guard.report is None


def test_offload_hooks_run_and_stay(sd):
    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook = Counter()
    add_hook_to_module(sd.unet, hook)
    try:
        same(sd)
        assert hook.calls == 2 * STEPS
        with fastguard.enable(sd, "cfg"):
            call(sd)
            remove_hook_from_module(sd.unet)  # in any order
    finally:
        remove_hook_from_module(sd.unet)
    same(sd)


def test_a_failing_call_leaves_a_working_pipeline(sd):
    def fail(*args):
        raise KeyboardInterrupt

    with fastguard.enable(sd, "cfg"):
        with pytest.raises(KeyboardInterrupt):
            call(sd, callback_on_step_end=fail)
        after = call(sd)
    torch.testing.assert_close(after, call(sd), rtol=0, atol=1e-4 * after.abs().max().item())


def test_ungated_policy_warns_once(sd, caplog):
    with fastguard.enable(sd, "dtp"):
        fastguard.enable(sd, "dtp")
    assert sum("no gate" in r.message for r in caplog.records) == 1
    caplog.clear()
    with fastguard.enable(sd, "dtp", gate=0.1):
        pass
    assert not [
        r for r in caplog.records if "its loop is not the one" not in r.message
    ]  # of another diffusers than the newest


def test_a_guard_says_what_it_is(sd):
    guard = fastguard.enable(sd, "dtp", gate=0.1, capture="off")
    try:
        assert (
            repr(guard)
            == "Guard of a StableDiffusionPipeline (text-to-image): policy 'dtp', capture='off', unguided='raise'"
        )
        call(sd)
        assert "2 images, fused path" in guard._repr_html_() and "&#x27;dtp&#x27;" in guard._repr_html_()
    finally:
        guard.disable()
    assert "disabled" in repr(guard)
