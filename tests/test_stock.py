"""Inference mode: a stock denoiser that nobody looks at runs in it, gives the same bits, and leaves nothing of it behind."""

from __future__ import annotations

import functools
import gc
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

import fastguard
from fastguard.stock import may_infer
from tests import pipelines
from tests.adapters import ip_adapter_state
from tests.guarded import SD_KINDS, call


@pytest.fixture
def modes(monkeypatch):
    """Whether it ran in inference mode, per convolution of the process; functional code is the one place where nobody is seen."""
    seen = []
    conv2d = F.conv2d

    def watched(*args, **kwargs):
        seen.append(torch.is_inference_mode_enabled())
        return conv2d(*args, **kwargs)

    monkeypatch.setattr(F, "conv2d", watched)
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
        assert sum(modes) and not ours.is_inference()
        ours.add_(0)
        left = [tensor for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor) and tensor.is_inference()]
        assert not left
        modes.clear()
        monkeypatch.setattr("fastguard.call.may_infer", lambda *_: False)
        again = call(pipe, **arguments)
    assert modes and not any(modes)
    torch.testing.assert_close(ours, again, rtol=0, atol=0)


@pytest.mark.gpu
def test_same_bits_on_a_gpu(modes, monkeypatch):
    pipe = pipelines.sd().to("cuda")
    with fastguard.enable(pipe, "dtp", capture="off"):
        ours = call(pipe)
        assert any(modes)
        monkeypatch.setattr("fastguard.call.may_infer", lambda *_: False)
        torch.testing.assert_close(ours, call(pipe), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["StableDiffusionControlNetPipeline", "StableDiffusionInpaintPipeline"])
def test_what_others_compute_does_not_run_in_it(kind, modes):
    """ControlNet and autoencoder are the pipeline's: only what the guard itself calls is its to decide on."""
    pipe = pipelines.sd(kind)
    unet = sum(isinstance(part, torch.nn.Conv2d) for part in pipe.unet.modules())
    with fastguard.enable(pipe, "cfg"):
        call(pipe, **SD_KINDS[kind]())
    assert sum(modes) % unet == 0 and 0 < sum(modes) < len(modes)


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


def keep(kept, original, x):
    kept.append(x)
    return original(x)


def partial_forward(pipe, patch):
    kept = []
    pipe.unet.conv_in.forward = functools.partial(keep, kept, pipe.unet.conv_in.forward)
    return lambda: kept[-1]


def decorated_class(pipe, patch):
    """By a decorator of torch's own, whose code is what the class holds then."""
    kept, original = [], torch.nn.Conv2d.forward
    patch.setattr(
        torch.nn.Conv2d, "forward", torch.no_grad()(lambda self, x: keep(kept, functools.partial(original, self), x))
    )
    return lambda: kept[-1]


def class_method(pipe, patch):
    kept, original = [], Attention.norm_encoder_hidden_states

    @functools.wraps(original)
    def method(self, states):
        kept.append(states)
        return original(self, states)

    patch.setattr(Attention, "norm_encoder_hidden_states", method)
    kept.append(torch.zeros(1))
    return lambda: kept[-1]


def compiled(pipe, patch):
    pipe.unet.conv_in.compile(backend="eager")


def quantised(pipe, patch):
    part = pipe.unet.conv_in
    part.weight = torch.nn.Parameter(part.weight.detach().as_subclass(Subclass))


FOREIGN = (
    processor,
    layer,
    hook,
    global_hook,
    instance_forward,
    partial_forward,
    class_method,
    decorated_class,
    compiled,
    quantised,
)


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


@pytest.mark.parametrize("around", [Watching, WatchesOnly, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_watches_around_the_call_keeps_it_as_in_stock(around, modes):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg"), around():
        call(pipe)
    assert modes and not any(modes)


def test_a_callback_keeps_it_as_in_stock(modes):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg"):
        call(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: tensors)
    assert modes and not any(modes)


def test_gradients_keep_it_as_in_stock():
    """The pipelines switch gradients off; who calls the undecorated function wants them."""
    denoiser = pipelines.unet()
    with torch.enable_grad():
        assert not may_infer(denoiser, torch.device("cpu"))
    with torch.no_grad():
        assert may_infer(denoiser, torch.device("cpu"))
