"""What a graph's key must name beside the model: each entry is left out in turn, which gives a wrong image, an error or no new graph."""

from __future__ import annotations

import os
from types import SimpleNamespace

import diffusers
import pytest
import torch

import fastguard
from fastguard.capture import attention, fingerprint, options, runner
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.static_inputs import StaticInputs
from fastguard.loop.loop import Loop
from tests import pipelines, schedulers
from tests.capture.calls import POLICIES, call, eager
from tests.capture.changes import with_lora
from tests.guarded import picture

pytestmark = pytest.mark.usefixtures("recorders")
planted = pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])

# Arguments and options ------------------------------------------------------------------------------------------------------


@planted
@pytest.mark.parametrize("name", ["prompt", "scale", "controlnet", "backend"])
def test_changed_arguments(name, blind, monkeypatch):
    if blind:  # in the same order: nothing is copied; plain values are not looked at; torch's switches neither
        patches = {
            "scale": (runner, "signature", lambda tree, resident: "same"),
            "backend": (fingerprint, "ambient", lambda: ()),
        }
        load = StaticInputs.load

        def once(self, tree):
            if not hasattr(self, "loaded"):
                load(self, tree)
            self.loaded = True

        monkeypatch.setattr(*patches.get(name, (StaticInputs, "load", once)))
    pipe = with_lora()
    first, second = {}, {}
    if name == "prompt":
        second = {"prompt": ["another", "entirely"]}
    elif name == "scale":
        first, second = ({"cross_attention_kwargs": {"scale": s}} for s in (1.0, 0.2))
    elif name == "controlnet":
        pipe = pipelines.sd("StableDiffusionControlNetPipeline")
        image = {"image": [picture(16), picture(16, 1)]}
        first, second = ({**image, "controlnet_conditioning_scale": s} for s in (1.0, 0.2))
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        call(pipe, **first)
        count = len(guard.graphs())
        if name == "backend":
            torch.backends.cuda.enable_flash_sdp(False)
        try:
            after = call(pipe, **second)
        finally:
            torch.backends.cuda.enable_flash_sdp(True)
        recorded_anew = len(guard.graphs()) - count
    expected, _ = eager(pipe, **second)
    if name == "backend":  # the same numbers on the CPU: only whether it was looked at can be seen
        assert (recorded_anew == 0) == blind
    else:
        assert torch.equal(after, expected) != blind


def test_arguments_in_memory_that_nobody_keeps_track_of():
    """As a ControlNet gives them that was compiled with reduce-overhead: in every step new tensors of no version over the same memory."""
    pipe = pipelines.sd("StableDiffusionControlNetPipeline")
    forward, memory = pipe.controlnet.forward, []
    for parameter in pipe.controlnet.parameters():  # its last layers are zeros
        torch.nn.init.normal_(parameter, std=0.2)

    def reusing(*args, **kwargs):
        down, mid = forward(*args, **kwargs)
        outputs = [tensor.detach().numpy() for tensor in (*down, mid)]
        if not memory:
            memory.extend(output.copy() for output in outputs)
        for place, output in zip(memory, outputs, strict=True):
            place[...] = output
        *down, mid = map(torch.from_numpy, memory)
        return tuple(down), mid

    pipe.controlnet.forward = reusing
    kwargs = {"image": [picture(16), picture(16, 1)], "steps": 4}
    expected, _ = eager(pipe, **kwargs)
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        for _ in range(2):
            assert torch.equal(call(pipe, **kwargs), expected)
            assert guard.report.path == "fused, step graph", guard.report.reason


# Who computes attention, and whether it is compiled, changes no number worth speaking of: planted backends do.


def _halved_attention(monkeypatch):
    """Attention backend "native_math" as one that computes half of it."""
    dispatch = attention.dispatch.dispatch_attention_fn

    def halved(*args, backend=None, **kwargs):
        return dispatch(*args, backend=backend, **kwargs) * (0.5 if backend is attention.Backend._NATIVE_MATH else 1.0)

    monkeypatch.setattr(attention.dispatch, "dispatch_attention_fn", halved)
    monkeypatch.setattr(options, "check", lambda *args: None)
    return {"attention_backend": "native"}, {"attention_backend": "native_math"}


def _halving_compiler(monkeypatch):
    """A torch.compile after which the denoiser gives half of what it did."""

    def compiled(denoiser):
        return lambda *args, **kwargs: (denoiser(*args, **kwargs)[0] * 0.5,)

    monkeypatch.setattr(torch, "compile", compiled)
    return {}, {"compile": True}


@planted
@pytest.mark.parametrize("plant", [_halved_attention, _halving_compiler])
def test_changed_options_are_recorded_anew(sd, plant, blind, monkeypatch):
    first, second = plant(monkeypatch)
    with fastguard.enable(sd, "cfg", capture="off", **second):
        expected = call(sd, steps=2)
    if blind:
        lend = options.Options.lend

        def without_options(self, *args):
            runner = lend(self, *args)
            runner._model.decides = None
            return runner

        monkeypatch.setattr(options.Options, "lend", without_options)
    with fastguard.enable(sd, "cfg", capture="step", **first) as guard:
        before = call(sd, steps=2)
        fastguard.enable(sd, "cfg", capture="step", **second)
        after = call(sd, steps=2)
        assert guard.report.path == "fused, step graph", guard.report.reason
    assert not torch.equal(before, expected), "the change must matter"
    assert torch.equal(after, expected) != blind


@planted
@pytest.mark.parametrize("where", ["registry", "model"])
def test_diffusers_own_choice_of_attention_is_looked_at(where, blind, monkeypatch):
    """`attention_backend` of diffusers, as a context and on the model: only whether it was looked at can be seen on the CPU."""
    pipe = pipelines.sd()
    if blind:
        monkeypatch.setattr(Fingerprint, "__call__", lambda self: "always the same")
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        call(pipe, steps=2)
        with attention.dispatch.attention_backend("_native_math" if where == "registry" else "native"):
            if where == "model":
                pipe.unet.set_attention_backend("_native_math")  # for everybody, too: the context puts that back
            call(pipe, steps=2)
        assert len(guard.graphs()) == (1 if blind else 2)


@planted
def test_a_backend_set_on_processors_alone_is_looked_at(blind, monkeypatch):
    pipe = pipelines.sd()
    if blind:
        monkeypatch.setattr(Fingerprint, "_object", lambda self, value, depth: "unread")
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        for backend in (None, attention.Backend._NATIVE_MATH):
            for processor in pipe.unet.attn_processors.values():
                processor._attention_backend = backend
            call(pipe, steps=2)
        assert len(guard.graphs()) == (1 if blind else 2)


# The body, and the shape of its tensors -------------------------------------------------------------------------------------


def compare(pipe, *calls):
    """(recorded after the call before, eager) of the second call; None for one that ends in an error."""

    def run(policy, mode, scheduler, kwargs):
        pipe.scheduler = (schedulers.SD[scheduler] if isinstance(scheduler, str) else scheduler)()
        pipe.to(kwargs.get("dtype", torch.float32))
        with_guard = fastguard.enable(pipe, policy, capture=mode)
        image = call(pipe, **{name: value for name, value in kwargs.items() if name != "dtype"})
        assert with_guard.report.path == ("fused" if mode == "off" else f"fused, {mode} graph")
        return image

    policy, _, *rest = calls[-1]
    guard = fastguard.enable(pipe, "cfg")
    try:
        expected = run(policy, "off", *rest)
        run(*calls[0])
        return run(*calls[1]), expected
    except (RuntimeError, IndexError, AssertionError):
        return None, expected
    finally:
        guard.disable()


def drawing(*rows):
    """A DDIM that draws noise in these rows alone."""

    class Drawing(diffusers.DDIMScheduler):
        fastguard_linear = True

        def step(self, model_output, timestep, sample, eta=0.0, generator=None, **kwargs):
            row = self.timesteps.tolist().index(int(timestep))
            return super().step(model_output, timestep, sample, float(row in rows), generator=generator, **kwargs)

    return lambda: Drawing.from_config(pipelines.ddim().config)


BODIES = {  # part of the key: two calls that it tells apart, and the key without it
    "branches": (("cfg", "loop", "ddim", {}), (POLICIES[1], "loop", "ddim", {}), lambda what: (what[0], *what[-2:])),
    "draws": (
        ("cfg", "loop", drawing(0, 1), {}),
        ("cfg", "loop", drawing(0, 2), {}),
        lambda what: (*what[:-2], what[-1]),
    ),
}


@planted
@pytest.mark.parametrize("part", BODIES)
def test_the_body_is_in_the_key(sd, part, blind, monkeypatch):
    first, second, without = BODIES[part]
    if blind:
        run = runner.BodyRunner.run
        monkeypatch.setattr(
            runner.BodyRunner,
            "run",
            lambda self, what, *args, **kwargs: run(self, without(what), *args, **kwargs),
        )
    after, expected = compare(sd, first, second)
    assert (after is not None and torch.equal(after, expected)) != blind


SHAPES = {  # fields of the shape: two calls that they tell apart
    ("shape", "stride"): (("cfg", "step", "ddim", {}), ("cfg", "step", "ddim", {"width": 24})),
    ("dtype", "noise_dtype"): (("cfg", "step", "ddim", {}), ("cfg", "step", "ddim", {"dtype": torch.bfloat16})),
    ("halves",): (("cfg", "loop", "ddim", {"guidance_scale": 1.0}), ("cfg", "loop", "ddim", {})),
    ("history",): (("cfg", "step", "ddim", {}), ("cfg", "step", "dpm-3m", {"steps": 4})),
    ("draws",): (("cfg", "step", "euler", {}), ("cfg", "step", "euler-ancestral", {})),
    ("timestep_dtype",): (("cfg", "loop", "ddim", {}), ("cfg", "loop", "euler", {})),
    ("rows",): (("cfg", "step", "ddim", {}), ("cfg", "step", "ddim", {"steps": 66})),
}


@planted
@pytest.mark.parametrize("fields", SHAPES, ids="-".join)
def test_the_shape_of_the_loops_tensors_is_in_the_key(fields, blind, monkeypatch):
    pipe = pipelines.sd()
    if blind:
        lease = runner.BodyRunner.lease

        def without(self, shape, *args, **kwargs):
            return lease(self, shape._replace(**dict.fromkeys(fields)), *args, **kwargs)

        monkeypatch.setattr(runner.BodyRunner, "lease", without)
    after, expected = compare(pipe, *SHAPES[fields])
    assert (after is not None and torch.equal(after, expected)) != blind


@planted
def test_the_backend_of_the_fused_op_is_in_the_key(sd, blind, monkeypatch):
    """FASTGUARD_BACKEND: one that is planted to give other numbers."""
    advance = Loop.advance

    def other(self, *args):
        advance(self, *args)
        if os.environ.get("FASTGUARD_BACKEND") == "torch":
            self.x.mul_(1.1)

    monkeypatch.setattr(Loop, "advance", other)
    if blind:
        monkeypatch.setattr(runner, "os", SimpleNamespace(environ={}))
    sd.scheduler = pipelines.ddim()
    with fastguard.enable(sd, "cfg", capture="step"):
        before = call(sd)
        monkeypatch.setenv("FASTGUARD_BACKEND", "torch")
        after = call(sd)
    expected, _ = eager(sd)
    assert not torch.equal(before, expected), "the change must matter"
    assert torch.equal(after, expected) != blind
