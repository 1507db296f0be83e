"""What a replay cannot notice: each change is recorded anew, and a plant that looks away gives a wrong image."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import fastguard
from fastguard.capture.fingerprint import Fingerprint
from fastguard.loop.loop import Loop
from tests import pipelines, schedulers
from tests.capture.calls import POLICIES, call, eager

pytestmark = pytest.mark.usefixtures("recorders")


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


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_a_changed_model_is_recorded_anew(change, blind, monkeypatch):
    after, expected = stale(with_lora(), change, monkeypatch, blind, steps=2)
    assert torch.equal(after, expected) != blind


BRANCHES = {own_scalar: ("_object", "unread"), own_module: ("_object", "unread"), class_scalar: ("_classes", [])}


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("change", BRANCHES)
def test_what_a_processor_holds(change, blind, monkeypatch):
    """Planted: the fingerprint reads all but plain objects, or all but classes."""
    if blind:
        branch, nothing = BRANCHES[change]
        monkeypatch.setattr(Fingerprint, branch, lambda *args: nothing)
    after, expected = stale(pipelines.sd(), change, monkeypatch, False, steps=2)
    assert torch.equal(after, expected) != blind


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
def test_ip_adapter_scale(blind, monkeypatch):
    from tests.adapters import ip_adapter_state

    encoder, processor = pipelines.image_encoder()
    pipe = pipelines.sd(image_encoder=encoder, feature_extractor=processor)
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    embeds = [torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2))]

    def change(pipe, value):
        pipe.set_ip_adapter_scale(0.2 if value else 1.0)

    after, expected = stale(pipe, change, monkeypatch, blind, ip_adapter_image_embeds=embeds)
    assert torch.equal(after, expected) != blind


def _python_counter(monkeypatch):
    advance = Loop.advance

    def counting(self, *args):
        self.calls = getattr(self, "calls", 0) + 1
        advance(self, *args)
        self.x.mul_(1.0 + 0.1 * self.calls)

    monkeypatch.setattr(Loop, "advance", counting)


def _baked_scale(monkeypatch):
    advance = Loop.advance
    load_plan = Loop.load_plan

    def remembering(self, plan):
        load_plan(self, plan)
        self.scale = float(plan.guidance.max())

    monkeypatch.setattr(Loop, "load_plan", remembering)

    def scaled(self, uncond, cond, noise):
        advance(self, uncond * self.scale, cond, noise)

    monkeypatch.setattr(Loop, "advance", scaled)


def _fresh_tensor(monkeypatch):
    load = Loop.load

    def fresh(self, *args):
        self.guidance = torch.zeros_like(self.guidance)
        load(self, *args)

    monkeypatch.setattr(Loop, "load", fresh)


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("plant", [_python_counter, _baked_scale, _fresh_tensor])
def test_planted_faults_of_our_own_loop_show_as_wrong_images(sd, plant, mode, monkeypatch):
    plant(monkeypatch)
    expected, _ = eager(sd, guidance_scale=9.0)
    with fastguard.enable(sd, "cfg", capture=mode) as guard:
        call(sd, guidance_scale=2.0)
        after = call(sd, guidance_scale=9.0)
        assert guard.report.path == f"fused, {mode} graph" and len(guard.graphs()) == 1
    assert not torch.equal(after, expected)


def test_toggling_between_two_models_records_each_once():
    pipe = with_lora()
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        for value in (False, True, False, True):
            lora_scale(pipe, value)
            call(pipe, steps=2)
        assert [info.replays for info in guard.graphs()] == [4, 4]
    lora_scale(pipe, False)


# Two hundred changes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_changes_in_random_order(recorders):
    """Shape, batch, scale, policy, scheduler, adapter and mode change at random: no wrong image, bounded memory."""
    chance, pipe = random.Random(0), with_lora()
    names = ["ddim", "euler-ancestral", "dpm-2m", "heun", "unipc-2", "lms"]
    settings = {
        "scheduler": names,
        "policy": [*POLICIES, "stp"],
        "mode": ["step", "loop"],
        "guidance_scale": [1.5, 4.0, 9.0],
        "steps": [2, 3],
        "seeds": [(1,), (1, 2)],
        "width": [16, 24],
        "change": [lora_scale, adapter, disabled, freeu, moved],
        "value": [False, True],
    }
    now = {name: values[0] for name, values in settings.items()}
    budget = 40 << 20
    guard = fastguard.enable(pipe, "cfg", capture="step")
    guard.graphs.limit, guard.graphs.budget = 6, budget
    try:
        for number in range(200):
            name = chance.choice(list(settings))
            now[name] = chance.choice([value for value in settings[name] if value is not now[name]])
            if name in ("change", "value"):
                now["change"](pipe, now["value"])
            pipe.scheduler = schedulers.SD[now["scheduler"]]()
            kwargs = {key: now[key] for key in ("guidance_scale", "steps", "seeds", "width")}
            images = {}
            for mode in ("off", now["mode"]):
                fastguard.enable(pipe, now["policy"], capture=mode)
                images[mode] = call(pipe, **kwargs)
            assert torch.equal(images["off"], images[now["mode"]]), (number, now)
            assert "graph" in guard.report.path, guard.report.reason
            assert len(guard.graphs()) <= 6 and guard.graphs.bytes <= budget
            assert len(guard.graphs._workspaces) <= 6
        assert recorders[0].recorded > 20
    finally:
        guard.disable()
        for change in settings["change"]:
            change(pipe, False)
        pipe.unet.disable_freeu()
    assert recorders[0].tapes == []
