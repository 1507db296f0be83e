"""Changes of a model that a replay cannot notice, each to be made and taken back: `change(pipe, value)`."""

from __future__ import annotations

import copy
import functools

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import fastguard
from fastguard.capture.fingerprint import Fingerprint
from tests import pipelines
from tests.capture.calls import call, eager


@functools.lru_cache(maxsize=1)
def with_lora():
    from peft import LoraConfig

    pipe = pipelines.sd()
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name=name)
    return pipe


def lora_scale(pipe, value):
    pipe.unet.set_adapters(["one"], [0.3 if value else 1.0])


def adapter(pipe, value):
    pipe.unet.set_adapters(["two" if value else "one"], [1.0])


def disabled(pipe, value):
    pipe.unet.disable_adapters() if value else pipe.unet.enable_adapters()


def freeu(pipe, value):
    pipe.unet.enable_freeu(s1=0.2 if value else 0.9, s2=0.2, b1=1.4, b2=1.6)


def processor_scalar(pipe, value):
    for module in pipe.unet.modules():
        if hasattr(module, "rescale_output_factor"):
            module.rescale_output_factor = 1.5 if value else 1.0


class Louder(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 1.5


def processor(pipe, value):
    pipe.unet.set_attn_processor(Louder() if value else AttnProcessor2_0())


class Scaled(AttnProcessor2_0):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.scale


def own_scalar(pipe, value):
    """The same processor with another number on it."""
    processors = [p for p in pipe.unet.attn_processors.values() if isinstance(p, Scaled)]
    if not processors:
        pipe.unet.set_attn_processor(Scaled(1.0))
    for processor in pipe.unet.attn_processors.values():
        processor.scale = 1.5 if value else 1.0


class Gated(AttnProcessor2_0):
    """With a module of its own that is not one of the model's."""

    def __init__(self):
        super().__init__()
        self.gate = gate(1.0)

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.gate.weight.sum()


def gate(value):
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def own_module(pipe, value):
    if not isinstance(next(iter(pipe.unet.attn_processors.values())), Gated):
        pipe.unet.set_attn_processor(Gated())
    for processor in pipe.unet.attn_processors.values():
        processor.gate = gate(1.5 if value else 1.0)


class Class(AttnProcessor2_0):
    scale = 1.0

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * self.scale


def class_scalar(pipe, value):
    if not isinstance(next(iter(pipe.unet.attn_processors.values())), Class):
        pipe.unet.set_attn_processor(Class())
    Class.scale = 1.5 if value else 1.0


def moved(pipe, value):
    weight = pipe.unet.conv_in.weight
    old = weight.data
    weight.data = old.clone() * (1.5 if value else 1 / 1.5)


def replaced(pipe, value):
    weight = pipe.unet.conv_in.weight
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight.detach() * (1.5 if value else 1 / 1.5))


def structure(pipe, value):
    pipe.unet.mid_block.resnets[0].nonlinearity = torch.nn.Tanh() if value else torch.nn.SiLU()


def padding(pipe, value):
    pipe.unet.conv_in.padding_mode = "circular" if value else "zeros"


@functools.lru_cache(maxsize=1)
def two_models(pipe):
    other = copy.deepcopy(pipe.unet)
    other.conv_in.weight.data.mul_(1.5)
    return pipe.unet, other


def another(pipe, value):
    vars(pipe)["unet"] = two_models(pipe)[value]  # not as an assignment would, which a guarded pipeline notices at once


MODEL_CHANGES = [
    *(lora_scale, adapter, disabled, freeu, processor, processor_scalar),
    *(moved, replaced, structure, padding, another),
]


def stale(pipe, change, monkeypatch, blind, options=None, **kwargs):
    """(recorded after a change, eager after it): equal, unless `blind` plants the fault that nothing looks for the change."""
    change(pipe, False)
    try:
        with monkeypatch.context() as patch:
            if blind:
                patch.setattr(Fingerprint, "__call__", lambda self: "always the same")
            with fastguard.enable(pipe, "cfg", capture="step", **(options or {})) as guard:
                before = call(pipe, **kwargs)
                change(pipe, True)
                after = call(pipe, **kwargs)
                assert guard.report.path == "fused, step graph", guard.report.reason
        expected, _ = eager(pipe, **kwargs)
        assert not torch.equal(before, expected), "the change must matter"
        return after, expected
    finally:
        change(pipe, False)
        pipe.unet.disable_freeu()
