"""Inference mode: a stock denoiser that nobody looks at runs in it, gives the same bits, and leaves nothing of it behind."""

from __future__ import annotations

import functools
import gc
import sys
from types import MethodType
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import CrossAttnStoreProcessor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastguard
from fastguard.loop import Loop
from fastguard.stock import FROM_ROWS, Unseen
from tests import pipelines
from tests.adapters import ip_adapter_state
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


class Keeping(AttnProcessor2_0):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.kept = hidden_states
        return super().__call__(attn, hidden_states, *args, **kwargs)


class Foreign(torch.nn.Conv2d):
    def forward(self, x):
        self.kept = x
        return super().forward(x)


class Subclass(torch.Tensor):
    pass


def processor(pipe, patch):
    pipe.unet.set_attn_processor(Keeping())
    return lambda: next(iter(pipe.unet.attn_processors.values())).kept


def layer(pipe, patch):
    old = pipe.unet.conv_in
    pipe.unet.conv_in = Foreign(old.in_channels, old.out_channels, 3, padding=1)
    return lambda: pipe.unet.conv_in.kept


def hook(pipe, patch):
    kept = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: kept.append(output))
    return lambda: kept[-1]


def global_hook(pipe, patch):
    kept = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.append(output))
    patch.setattr(pipe, "_undo", handle, raising=False)
    return lambda: next(one for one in reversed(kept) if isinstance(one, torch.Tensor))


def instance_forward(pipe, patch):
    kept, original = [], pipe.unet.conv_in.forward

    @functools.wraps(original)
    def forward(module, x):
        kept.append(x)
        return original(x)

    pipe.unet.conv_in.forward = MethodType(forward, pipe.unet.conv_in)
    return lambda: kept[-1]


def keep(kept, original, x, *args, **kwargs):
    kept.append(x)
    return original(x, *args, **kwargs)


def partial_forward(pipe, patch):
    kept = []
    pipe.unet.conv_in.forward = functools.partial(keep, kept, pipe.unet.conv_in.forward)
    return lambda: kept[-1]


def another_modules_forward(pipe, patch):
    """Torch's code, but of a module that is not among the model's."""
    kept, old = [], pipe.unet.conv_in
    other = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)
    other.register_forward_hook(lambda module, args, output: kept.append(output))
    old.forward = other.__call__
    return lambda: kept[-1]


def decorated_class(pipe, patch):
    """By a decorator of torch's own, whose code is what the class holds then."""
    kept, original = [], torch.nn.Conv2d.forward
    forward = torch.no_grad()(lambda self, x: keep(kept, functools.partial(original, self), x))
    patch.setattr(torch.nn.Conv2d, "forward", forward)
    return lambda: kept[-1]


def partial_method(pipe, patch):
    kept, original = [], Attention.forward
    method = functools.partialmethod(
        lambda self, kept, x, *a, **k: keep(kept, functools.partial(original, self), x, *a, **k), kept
    )
    patch.setattr(Attention, "forward", method)
    return lambda: kept[-1]


def mocked(pipe, patch):
    kept, original = [], functools.partial(AttnProcessor2_0.__call__, AttnProcessor2_0())
    mock = MagicMock(
        spec=[], side_effect=lambda attn, x, *a, **k: keep(kept, functools.partial(original, attn), x, *a, **k)
    )
    patch.setattr(AttnProcessor2_0, "__call__", mock)
    return lambda: kept[-1]


def property_forward(pipe, patch):
    kept, original = [], torch.nn.Conv2d.forward
    forward = property(lambda self: functools.partial(keep, kept, functools.partial(original, self)))
    patch.setattr(torch.nn.Conv2d, "forward", forward)
    return lambda: kept[-1]


def base_class(pipe, patch):
    kept, original = [], torch.nn.Module.__call__

    def called(self, *args, **kwargs):
        if isinstance(self, torch.nn.Conv2d):
            kept.append(args[0])
        return original(self, *args, **kwargs)

    patch.setattr(torch.nn.Module, "__call__", called)
    return lambda: kept[-1]


def compiled_class(pipe, patch):
    patch.setattr(torch.nn.SiLU, "forward", torch.compile(torch.nn.SiLU.forward, backend="eager"))


def functional(pipe, patch):
    kept = []
    patch.setattr(F, "scaled_dot_product_attention", functools.partial(keep, kept, F.scaled_dot_product_attention))
    return lambda: kept[-1]


def torchs_own(pipe, patch):
    kept = []
    patch.setattr(torch, "cat", functools.partial(keep, kept, torch.cat))
    return lambda: kept[-1][0]


def tensors_method(pipe, patch):
    kept, original = [], torch.Tensor.view
    patch.setattr(torch.Tensor, "view", lambda self, *args: keep(kept, original, self, *args))
    return lambda: kept[-1].float()


class Raising:
    def __getattr__(self, name):
        raise RuntimeError(name)


def raising(pipe, patch):
    patch.setattr(sys.modules["diffusers.models.attention_processor"], "note", Raising(), raising=False)


def module_function(pipe, patch):
    kept, embeddings = [], sys.modules["diffusers.models.embeddings"]
    patch.setattr(
        embeddings,
        "get_timestep_embedding",
        lambda x, *a, original=embeddings.get_timestep_embedding, **k: keep(kept, original, x, *a, **k),
    )
    return lambda: kept[-1].float()


def processor_of_another_pipeline(pipe, patch):
    """diffusers' own, made to keep maps."""
    place = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    place.processor = CrossAttnStoreProcessor()
    return lambda: place.processor.attention_probs


def cached_parametrization(pipe, patch):
    torch.nn.utils.parametrizations.weight_norm(pipe.unet.conv_in)


def subclass_elsewhere(pipe, patch):
    pipe.unet.conv_in.note = torch.zeros(1).as_subclass(Subclass)


def subclass_buffer(pipe, patch):
    pipe.unet.conv_in.register_buffer("note", torch.zeros(1).as_subclass(Subclass))


def another_callable(pipe, patch):
    """Whoever else holds code may keep what it sees."""
    pipe.unet.conv_in.note = RopeEmbedder()


def of_no_module(pipe, patch):
    pipe.unet.conv_in.__class__ = type("Lost", (torch.nn.Conv2d,), {"__module__": "diffusers.models.nowhere"})


def without_a_module(pipe, patch):
    pipe.unet.conv_in.__class__ = type("Nameless", (torch.nn.Conv2d,), {"__module__": None})


def class_method(pipe, patch):
    kept, original = [], Attention.head_to_batch_dim
    pipe.unet.set_attn_processor(AttnProcessor())  # which calls it

    @functools.wraps(original)
    def method(self, x, *args, **kwargs):
        return keep(kept, functools.partial(original, self), x, *args, **kwargs)

    patch.setattr(Attention, "head_to_batch_dim", method)
    return lambda: kept[-1]


def compiled(pipe, patch):
    pipe.unet.conv_in.compile(backend="eager")


def quantised(pipe, patch):
    part = pipe.unet.conv_in
    part.weight = torch.nn.Parameter(part.weight.detach().as_subclass(Subclass))


FOREIGN = (
    processor, layer, hook, global_hook, instance_forward, partial_forward, another_modules_forward, class_method, decorated_class,
    partial_method, mocked, torchs_own, tensors_method, raising, functional, module_function, processor_of_another_pipeline, cached_parametrization, compiled, quantised,
    subclass_elsewhere, subclass_buffer, without_a_module, of_no_module, another_callable, property_forward, base_class, compiled_class,
)  # fmt: skip


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
