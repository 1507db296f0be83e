"""Graphs of steps and of whole generations against the same call run eagerly, bit for bit, in the simulator."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

import fastguard
from fastguard.capture import attention, engine
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.static_loop import StaticLoop
from fastguard.loop import Loop
from tests import pipelines, schedulers
from tests.capture import simulator

SIZE = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def recorders():
    with simulator.recording() as made:
        yield made


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def call(pipe, *, steps=3, seeds=(1, 2), **kwargs):
    defaults = {"prompt": ["a red cat", "two dogs"][: len(seeds)], "guidance_scale": 4.0, **SIZE}
    arguments = {**defaults, "num_inference_steps": steps, "output_type": "latent", **kwargs}
    return pipe(generator=pipelines.generators(list(seeds)), **arguments).images


def eager(pipe, policy="cfg", **kwargs):
    with fastguard.enable(pipe, policy, capture="off") as guard:
        return call(pipe, **kwargs), guard.report


def check(pipe, policy="cfg", mode="step", path=None, times=1, **kwargs):
    """Recorded equals eager to the bit, in images and in reports."""
    expected, report = eager(pipe, policy, **kwargs)
    with fastguard.enable(pipe, policy, capture=mode) as guard:
        for _ in range(times):
            assert torch.equal(call(pipe, **kwargs), expected)
            ours = guard.report
            assert ours.path == (path or f"fused, {mode} graph"), ours.reason
            for a, b in zip(ours, report, strict=True):
                a, b = a.to_dict(), b.to_dict()
                for name in ("path", "reason"):
                    del a[name], b[name]
                assert a == b
    return ours


# Every scheduler, policy and family -----------------------------------------------------------------------------------------

POLICIES = [
    "cfg",
    fastguard.policy("stp", t_star=600),
    fastguard.policy("og+dtp", gate=0.01),
    fastguard.policy("dtp", rule="drop"),
]


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("name", schedulers.SD)
def test_schedulers(name, mode):
    pipe = pipelines.sd(scheduler=schedulers.SD[name]())
    policy = POLICIES[list(schedulers.SD).index(name) % len(POLICIES)]
    check(pipe, policy, mode, steps=4 if "3" in name else 3)


@pytest.mark.parametrize("name", schedulers.OWN_STEP)
def test_schedulers_with_a_step_of_their_own(name):
    """Denoiser, decision and guidance are recorded, the scheduler's own step() runs."""
    pipe = pipelines.sd(scheduler=schedulers.OWN_STEP[name]())
    for mode in ("step", "loop"):
        check(pipe, "og+dtp", mode, path="own step, step graph", steps=50)


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize(
    "policy",
    [
        *fastguard.PRESETS,
        fastguard.policy("dtp", gate=0.5, gate_steps=2),
        fastguard.policy("cfg", guidance_scale=(1.0, 3.0, 0.0, 4.0, 5.0)),
        ["cfg", fastguard.policy("og+dtp", guidance_scale=6.0)],
    ],
    ids=str,
)
def test_policies(sd, policy, mode):
    check(sd, policy, mode, steps=5, times=2)


def test_unguided(sd):
    for mode in ("step", "loop"):
        check(sd, mode=mode, guidance_scale=1.0)


@pytest.mark.parametrize("name", schedulers.FLOW)
def test_stable_diffusion_3(name):
    pipe = pipelines.sd3(scheduler=schedulers.FLOW[name]())
    report = check(pipe, mode="loop", path="fused, step graph", height=32, width=32)
    assert "only Stable Diffusion and SDXL" in report.reason


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_sdxl(mode):
    check(pipelines.sdxl(), "og+dtp", mode, times=2)


def test_pixart():
    kwargs = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
    check(pipelines.pixart(), **kwargs, **pipelines.pixart_embeds(2))


class Int8(torch.nn.Module):
    """A linear layer with weights in 8 bits, as quantised models have them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = torch.nn.Parameter(linear.weight.detach().abs().amax() / 127)
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_quantised_weights():
    pipe = pipelines.sd()
    plain, _ = eager(pipe)
    for module in list(pipe.unet.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear and name in ("to_q", "to_k", "to_v"):
                setattr(module, name, Int8(child))
    for mode in ("step", "loop"):
        check(pipe, mode=mode, times=2)
    assert not torch.equal(eager(pipe)[0], plain)


def test_own_step_and_what_a_graph_does_not_do():
    thresholding = pipelines.sd(scheduler=pipelines.ddim(thresholding=True))
    for mode in ("step", "loop"):
        check(thresholding, mode=mode, path="own step, step graph")
    check(thresholding, guidance_rescale=0.5, path="own step")


# Nothing shared between calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_latents_stay_what_they_were(sd, mode):
    with fastguard.enable(sd, "cfg", capture=mode) as guard:
        first = call(sd)
        kept, report = first.clone(), guard.report
        call(sd, seeds=(3, 4))
        assert torch.equal(first, kept)
        assert report[0].d_curve != guard.report[0].d_curve


def test_one_step_graph_serves_every_schedule_scale_and_policy(sd, recorders):
    with fastguard.enable(sd, "cfg", capture="step") as guard:
        for steps in (3, 7):
            for scale in (2.0, 9.0):
                call(sd, steps=steps, guidance_scale=scale)
                fastguard.enable(sd, "og+dtp", gate=0.1, capture="step")
                call(sd, steps=steps, guidance_scale=scale)
        (graph,) = guard.graphs()
        assert graph.replays == 40
    assert recorders[0].tapes == [], "disable() gives the memory back"


def test_inference_mode_and_no_grad_in_turn(sd):
    expected, _ = eager(sd)
    with fastguard.enable(sd, "cfg", capture="step") as guard:
        for inference in (True, False, True, False):
            with torch.inference_mode(inference):
                assert torch.equal(call(sd), expected)
                assert guard.report.path == "fused, step graph", guard.report.reason


def test_what_a_call_notes_on_the_pipeline(sd):
    for mode in ("step", "loop"):
        with fastguard.enable(sd, "cfg", capture=mode):
            call(sd, steps=5)
            assert sd.num_timesteps == 5 and len(sd.scheduler.timesteps) == 5


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_decoded_images_and_generators_end_as_they_do_eagerly(mode):
    pipe = pipelines.sd(scheduler=schedulers.SD["euler-ancestral"]())
    ends = []
    for capture in ("off", mode):
        generators = pipelines.generators([1, 2])
        with fastguard.enable(pipe, "cfg", capture=capture):
            images = pipe(["a", "b"], num_inference_steps=3, generator=generators, output_type="pt", **SIZE).images
        ends.append((images, *(g.get_state() for g in generators)))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# Callbacks ------------------------------------------------------------------------------------------------------------------


def _replace(pipe, step, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.5}


def _in_place(pipe, step, timestep, kwargs):
    kwargs["latents"].mul_(0.5)
    kwargs["prompt_embeds"].data.mul_(1.1)  # a write that no version counts
    return {}


def _scale(pipe, step, timestep, kwargs):
    pipe._guidance_scale += 1.0
    return {}


def _cut_off(pipe, step, timestep, kwargs):
    if step != 1:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}


def _freeu(pipe, step, timestep, kwargs):
    pipe.unet.enable_freeu(s1=0.9 - 0.2 * step, s2=0.2, b1=1.2, b2=1.4)
    if step == 3:
        pipe.unet.disable_freeu()
    return {}


@pytest.mark.parametrize("callback", [_replace, _in_place, _scale, _cut_off, _freeu])
@pytest.mark.parametrize("mode", ["step", "loop"])
def test_callbacks_run_step_by_step(callback, mode):
    pipe = pipelines.sd(scheduler=schedulers.SD["euler"]())
    kept = []

    def keeping(pipe, step, timestep, kwargs):
        kept.append((kwargs["latents"], kwargs["latents"].clone()))
        return callback(pipe, step, timestep, kwargs)

    inputs = ["latents", "prompt_embeds"]
    report = check(pipe, mode=mode, path="fused, step graph", steps=4, callback_on_step_end=callback,
                   callback_on_step_end_tensor_inputs=inputs)  # fmt: skip
    assert (report.reason is None) == (mode == "step") or "a callback looks" in report.reason
    if callback is _replace:
        with fastguard.enable(pipe, "cfg", capture="step"):
            call(pipe, callback_on_step_end=keeping, callback_on_step_end_tensor_inputs=inputs)
        assert all(torch.equal(a, b) for a, b in kept), "kept latents are not overwritten"


def test_half_precision_latents_keep_their_float32_under_a_callback():
    pipe = pipelines.sd().to(torch.bfloat16)
    check(pipe, steps=4, callback_on_step_end=lambda *args: {})


# What goes stale ------------------------------------------------------------------------------------------------------------


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


MODEL_CHANGES = [lora_scale, adapter, disabled, freeu, processor_scalar, moved, replaced, structure, padding]  # fmt: skip


def stale(pipe, change, monkeypatch, blind, **kwargs):
    """(recorded after a change, eager after it): equal, unless `blind` plants the fault that nothing looks for the change."""
    change(pipe, False)
    try:
        with monkeypatch.context() as patch:
            if blind:
                patch.setattr(Fingerprint, "__call__", lambda self: "always the same")
            with fastguard.enable(pipe, "cfg", capture="step") as guard:
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


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
def test_ip_adapter_scale(blind, monkeypatch):
    from tests.test_enable import _ip_adapter_state

    encoder, processor = pipelines.image_encoder()
    pipe = pipelines.sd(image_encoder=encoder, feature_extractor=processor)
    pipe.unet._load_ip_adapter_weights([_ip_adapter_state(pipe.unet)])
    embeds = [torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2))]

    def change(pipe, value):
        pipe.set_ip_adapter_scale(0.2 if value else 1.0)

    after, expected = stale(pipe, change, monkeypatch, blind, ip_adapter_image_embeds=embeds)
    assert torch.equal(after, expected) != blind


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("name", ["prompt", "scale", "controlnet", "backend"])
def test_changed_arguments(name, blind, monkeypatch):
    from fastguard.capture import fingerprint, graphed
    from fastguard.capture.static_inputs import StaticInputs

    if blind:  # in the same order: nothing is copied; plain values are not looked at; torch's switches neither
        patches = {
            "scale": (graphed, "signature", lambda tree, resident: "same"),
            "backend": (fingerprint, "ambient", lambda: ()),
        }
        load = StaticInputs.load

        def once(self, tree, always=False):
            if not hasattr(self, "loaded"):
                load(self, tree, always=always)
            self.loaded = True

        monkeypatch.setattr(*patches.get(name, (StaticInputs, "load", once)))
    pipe = with_lora()
    first, second = {}, {}
    if name == "prompt":
        second = {"prompt": ["another", "entirely"]}
    elif name == "scale":
        first, second = ({"cross_attention_kwargs": {"scale": s}} for s in (1.0, 0.2))
    elif name == "controlnet":
        from tests.test_enable import picture

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


# Who computes attention, and whether it is compiled, changes no number worth speaking of: planted backends do.


def _halved_attention(monkeypatch):
    """Attention backend "native_math" as one that computes half of it."""
    dispatch = attention.dispatch.dispatch_attention_fn

    def halved(*args, backend=None, **kwargs):
        return dispatch(*args, backend=backend, **kwargs) * (0.5 if backend is attention.Backend._NATIVE_MATH else 1.0)

    monkeypatch.setattr(attention.dispatch, "dispatch_attention_fn", halved)
    monkeypatch.setattr(engine, "check", lambda *args: None)
    return {"attention_backend": "native"}, {"attention_backend": "native_math"}


def _halving_compiler(monkeypatch):
    """A torch.compile after which the denoiser gives half of what it did."""

    def compiled(denoiser, options):
        return denoiser if options is None else lambda *args, **kwargs: (denoiser(*args, **kwargs)[0] * 0.5,)

    monkeypatch.setattr(engine, "compile_denoiser", compiled)
    return {}, {"compile": True}


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("plant", [_halved_attention, _halving_compiler])
def test_changed_options_are_recorded_anew(sd, plant, blind, monkeypatch):
    first, second = plant(monkeypatch)
    with fastguard.enable(sd, "cfg", capture="off", **second):
        expected = call(sd, steps=2)
    if blind:
        lend = engine.Engine.lend

        def without_options(self, *args):
            runs, capturing = lend(self, *args)
            return runs, dataclasses.replace(capturing, options=None)

        monkeypatch.setattr(engine.Engine, "lend", without_options)
    with fastguard.enable(sd, "cfg", capture="step", **first) as guard:
        before = call(sd, steps=2)
        fastguard.enable(sd, "cfg", capture="step", **second)
        after = call(sd, steps=2)
        assert guard.report.path == "fused, step graph", guard.report.reason
    assert not torch.equal(before, expected), "the change must matter"
    assert torch.equal(after, expected) != blind


@pytest.mark.parametrize("blind", [False, True], ids=["", "planted"])
@pytest.mark.parametrize("where", ["registry", "model"])
def test_diffusers_own_choice_of_attention_is_looked_at(where, blind, monkeypatch):
    """`attention_backend` of diffusers, as a context and on the model: only whether it was looked at can be seen on the CPU."""
    pipe = pipelines.sd()
    if blind:
        monkeypatch.setattr(Fingerprint, "__call__", lambda self: "always the same")
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        call(pipe, steps=2)
        if where == "registry":
            with attention.dispatch.attention_backend("_native_math"):
                call(pipe, steps=2)
        else:
            pipe.unet.set_attention_backend("_native_math")
            call(pipe, steps=2)
        assert len(guard.graphs()) == (1 if blind else 2)


def _python_counter(monkeypatch):
    advance = Loop.advance

    def counting(self, *args):
        self.calls = getattr(self, "calls", 0) + 1
        advance(self, *args)
        self.x.mul_(1.0 + 0.1 * self.calls)

    monkeypatch.setattr(Loop, "advance", counting)


def _baked_scale(monkeypatch):
    advance = Loop.advance
    for kind in (Loop, StaticLoop):

        def remembering(self, plan, load_plan=kind.load_plan):
            load_plan(self, plan)
            self.scale = float(plan.guidance.max())

        monkeypatch.setattr(kind, "load_plan", remembering)

    def scaled(self, uncond, cond, noise):
        advance(self, uncond * self.scale, cond, noise)

    monkeypatch.setattr(Loop, "advance", scaled)


def _fresh_tensor(monkeypatch):
    load = StaticLoop.load

    def fresh(self, *args):
        self.guidance = torch.zeros_like(self.guidance)
        load(self, *args)

    monkeypatch.setattr(StaticLoop, "load", fresh)


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


def test_two_hundred_changes_in_random_order(recorders):
    """Shape, batch, scale, policy, scheduler, adapter and mode change at random: no wrong image, bounded memory."""
    chance, pipe = random.Random(0), with_lora()
    names = ["ddim", "euler-ancestral", "dpm-2m", "heun", "unipc-2", "lms"]
    settings = {
        "scheduler": names,
        "policy": [*POLICIES, "stp"],
        "mode": ["step", "step", "loop"],
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
            now[name] = chance.choice(settings[name])
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


# On a device ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["step", "loop"])
def test_graphs_of_a_device(mode):
    pipe = pipelines.sd(scheduler=schedulers.SD["euler-ancestral"]()).to("cuda")
    kwargs = {"steps": 6, "height": 64, "width": 64}
    for policy in ("cfg", "og+dtp", "stp"):
        with fastguard.enable(pipe, policy, capture="off"):
            expected = [call(pipe, seeds=seeds, **kwargs) for seeds in ((1, 2), (3, 4))]
        with fastguard.enable(pipe, policy, capture=mode) as guard:
            for _ in range(2):
                images = [call(pipe, seeds=seeds, **kwargs) for seeds in ((1, 2), (3, 4))]
            assert guard.report.path == f"fused, {mode} graph", guard.report.reason
            assert all(info.bytes >= 0 and info.replays > 0 for info in guard.graphs())
        for a, b in zip(images, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
