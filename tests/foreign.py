"""Who might keep or watch what a denoiser computes: each puts something foreign into a pipeline's model.

add(pipe, monkeypatch) -> what gives a tensor that was kept, or None
"""

from __future__ import annotations

import functools
import sys
from types import MethodType
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import CrossAttnStoreProcessor


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
