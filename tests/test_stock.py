"""Inference mode: a stock denoiser that nobody looks at runs in it, gives the same bits, and leaves nothing of it behind."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastguard
from fastguard.loop import Loop
from fastguard.stock import FROM_ROWS, Unseen
from tests import pipelines
from tests.adapters import ip_adapter_state
from tests.foreign import FOREIGN, Subclass, global_hook
from tests.guarded import SD_KINDS
from tests.guarded import call as short_call


def call(pipe, **kwargs):
    return short_call(pipe, **{"num_inference_steps": FROM_ROWS, **kwargs})


@pytest.fixture
def modes(monkeypatch):
    """Per row: whether the denoiser ran in inference mode."""
    seen, advance = [], Loop.advance

    def noted(self, uncond, *args):
        seen.append(uncond.is_inference())
        return advance(self, uncond, *args)

    monkeypatch.setattr(Loop, "advance", noted)
    return seen


def with_ip_adapter():
    pipe = pipelines.sd()
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    return pipe


SIZE = {"height": 32, "width": 32}
PIXART = {**SIZE, "use_resolution_binning": False, "prompt": None, "negative_prompt": None}
FAMILIES = {
    "sd": (pipelines.sd, {}),
    "sdxl": (pipelines.sdxl, {}),
    "sd3": (pipelines.sd3, SIZE),
    "pixart": (pipelines.pixart, {**PIXART, **pipelines.pixart_embeds(2)}),
    "ip-adapter": (with_ip_adapter, {"ip_adapter_image_embeds": [torch.ones(4, 1, 32)]}),
}


@pytest.mark.parametrize("policy", ["cfg", "stp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_and_nothing_left(family, policy, modes, monkeypatch):
    make, arguments = FAMILIES[family]
    pipe = make()
    with fastguard.enable(pipe, policy):
        ours = call(pipe, **arguments)
        assert modes and all(modes) and not ours.is_inference()
        ours.add_(0)
        left = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor) and tensor.is_inference()]
        assert not left
        modes.clear()
        monkeypatch.setattr(Unseen, "__call__", lambda *_: False)
        again = call(pipe, **arguments)
    assert modes and not any(modes)
    torch.testing.assert_close(ours, again, rtol=0, atol=0)


@pytest.mark.gpu
def test_same_bits_on_a_gpu(modes, monkeypatch):
    pipe = pipelines.sd().to("cuda")
    with fastguard.enable(pipe, "dtp", capture="off"):
        ours = call(pipe)
        assert all(modes)
        monkeypatch.setattr(Unseen, "__call__", lambda *_: False)
        torch.testing.assert_close(ours, call(pipe), rtol=0, atol=0)


def test_what_others_compute_does_not_run_in_it(modes):
    """The ControlNet is called by the pipeline: only what the guard itself calls is its to decide on."""
    pipe, others = pipelines.sd("StableDiffusionControlNetPipeline"), []
    pipe.controlnet.register_forward_hook(lambda *_: others.append(torch.is_inference_mode_enabled()))
    with fastguard.enable(pipe, "cfg"):
        call(pipe, **SD_KINDS["StableDiffusionControlNetPipeline"]())
    assert all(modes) and others and not any(others)


def test_an_inpainting_pipeline_sees_nothing_of_it(modes):
    """It blends the latents itself between two rows."""
    pipe = pipelines.sd("StableDiffusionInpaintPipeline")
    with fastguard.enable(pipe, "cfg"):
        call(pipe, strength=1.0, **SD_KINDS["StableDiffusionInpaintPipeline"]())
    assert modes and all(modes)


def test_a_short_call_does_not_pay_for_the_look(modes):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg"):
        call(pipe, num_inference_steps=FROM_ROWS - 1)
    assert not any(modes)


# Who might keep or watch what is computed -------------------------------------------------------------------------------


@pytest.mark.parametrize("add", FOREIGN, ids=lambda add: add.__name__)
def test_what_is_foreign_in_the_model_runs_as_in_stock(add, modes, monkeypatch):
    pipe = pipelines.sd()
    kept = add(pipe, monkeypatch)
    try:
        with fastguard.enable(pipe, "cfg"):
            call(pipe)
    finally:
        if add is global_hook:
            pipe._undo.remove()
    assert modes and not any(modes)
    if kept is not None:
        weight = torch.ones((), requires_grad=True)
        (kept() * weight).sum().backward()  # what inference mode would forbid


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class WatchesOnly(Watching):
    """A mode that graphs may be recorded under: it sees the operations, and would see others in inference mode."""

    watches_only = True


class WatchesFunctions(TorchFunctionMode):
    watches_only = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


AROUND = (Watching, WatchesOnly, WatchesFunctions, lambda: torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level)


@pytest.mark.parametrize("around", AROUND, ids=["dispatch", "watches", "functions", "autocast", "forward AD"])
def test_what_watches_around_the_call_keeps_it_as_in_stock(around, modes):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg"), around():
        call(pipe)
    assert modes and not any(modes)


@pytest.mark.parametrize("key", ["AutogradCPU", "CPU"])
def test_a_kernel_in_the_place_of_torchs_own_runs(key, modes):
    pipe, library = pipelines.sd(), torch.library.Library("aten", "IMPL")
    library.impl("silu", lambda x: x * torch.sigmoid(x) * 1.5, key, allow_override=True)
    try:
        with fastguard.enable(pipe, "cfg"):
            call(pipe)
    finally:
        library._destroy()
    assert modes and not any(modes)


def test_callers_own_tensors_see_what_they_see_in_stock(modes):
    pipe, embeds = pipelines.sd(), torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(1))
    with fastguard.enable(pipe, "cfg"):
        call(pipe, prompt=None, prompt_embeds=embeds.as_subclass(Subclass), negative_prompt_embeds=embeds)
        assert modes and not any(modes)
        call(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=embeds)
        assert any(modes)


def test_a_callback_keeps_it_as_in_stock(modes):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg"):
        call(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: tensors)
    assert modes and not any(modes)


def test_a_hook_that_somebody_adds_between_two_rows_sees_what_it_would(modes):
    """A hook on the ControlNet is user code between two rows."""
    pipe, kept, rows = pipelines.sd("StableDiffusionControlNetPipeline"), [], []

    def hooking(*_):
        rows.append(None)
        if len(rows) == 3:
            pipe.unet.mid_block.register_forward_hook(lambda module, args, output: kept.append(output))

    pipe.controlnet.register_forward_hook(hooking)
    with fastguard.enable(pipe, "cfg"):
        call(pipe, **SD_KINDS["StableDiffusionControlNetPipeline"]())
    assert all(modes[:2]) and not any(modes[2:])
    assert kept and not any(one.is_inference() for one in kept)


def test_a_replaced_step_keeps_it_as_in_stock(modes):
    """It may replace anything between two rows."""
    pipe = pipelines.sd()
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    with fastguard.enable(pipe, "cfg"):
        call(pipe)
    assert modes and not any(modes)


def test_gradients_keep_it_as_in_stock():
    """The pipelines switch gradients off; who calls the undecorated function wants them."""
    denoiser = pipelines.unet()
    with torch.enable_grad():
        assert not Unseen(denoiser, torch.device("cpu"))()
    with torch.no_grad():
        assert Unseen(denoiser, torch.device("cpu"))()
        assert not Unseen(denoiser.forward, torch.device("cpu"))()
