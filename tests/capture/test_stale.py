"""What a replay cannot notice: each change is recorded anew, and a plant that looks away gives a wrong image."""

from __future__ import annotations

import random

import pytest
import torch

import fastguard
from fastguard.capture.fingerprint import Fingerprint
from fastguard.loop.loop import Loop
from tests import pipelines, schedulers
from tests.capture.calls import POLICIES, call, eager
from tests.capture.changes import (
    MODEL_CHANGES,
    adapter,
    class_scalar,
    disabled,
    freeu,
    lora_scale,
    moved,
    own_module,
    own_scalar,
    stale,
    with_lora,
)

pytestmark = pytest.mark.usefixtures("recorders")


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
        assert recorders[0].recorded > 20
    finally:
        guard.disable()
        for change in settings["change"]:
            change(pipe, False)
        pipe.unet.disable_freeu()
    assert recorders[0].tapes == []
