"""Graphs of steps and of whole generations against the same call run eagerly, bit for bit, in the simulator."""

from __future__ import annotations

import diffusers
import pytest
import torch

import fastguard
from tests import pipelines, schedulers
from tests.capture.calls import SIZE, call, check, eager
from tests.guarded import SD_KINDS

pytestmark = pytest.mark.usefixtures("recorders")

# Every policy and family -----------------------------------------------------------------------------------------


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


def test_the_end_of_an_inner_guard_gives_its_graphs_back(sd):
    with fastguard.enable(sd, "cfg", capture="off") as outer:
        with fastguard.enable(sd, "cfg", capture="step") as inner:
            call(sd)
            assert inner.graphs()
        assert outer.graphs() == [] and outer.graphs.bytes == 0


def test_a_report_that_cannot_be_made_keeps_no_tensors(sd, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room for a report")

    with fastguard.enable(sd, "cfg", capture="step") as guard:
        expected = call(sd)
        with monkeypatch.context() as patch:
            patch.setattr("fastguard.loop.report.Report.__init__", full)
            with pytest.raises(torch.OutOfMemoryError, match="no room"):
                call(sd)
        assert torch.equal(call(sd), expected)
        assert guard.report.path == "fused, step graph", guard.report.reason


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


@pytest.mark.parametrize("make", [pipelines.sd, pipelines.sdxl])
@pytest.mark.parametrize("kind", SD_KINDS)
def test_other_pipelines(kind, make):
    """Images and masks to start from, residuals of a ControlNet; with a scheduler that draws noise."""
    arguments = SD_KINDS[kind]()
    size = {name: arguments.pop(name) for name in SIZE if name in arguments}
    kind = kind if make is pipelines.sd else kind.replace("StableDiffusion", "StableDiffusionXL")
    pipe = make(kind, scheduler=schedulers.SD["euler-ancestral"]())
    report = check(pipe, "og+dtp", "loop", path="fused, step graph", size=size, **arguments)
    assert "only Stable Diffusion and SDXL" in report.reason


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


def runge_kutta():
    return pipelines.sd(scheduler=diffusers.PNDMScheduler(**pipelines.BETAS, skip_prk_steps=False, steps_offset=1))


@pytest.mark.parametrize(("policy", "mode"), [("og+dtp", "step"), ("stp", "loop")])
def test_pndm_with_runge_kutta_steps(policy, mode):
    """Five remembered tensors, more than a row has: the scheduler's own step() runs, denoiser, decision and guidance are recorded."""
    pipe = runge_kutta()
    report = check(pipe, policy, mode, path="own step, step graph", steps=5)
    assert "Runge-Kutta" in report.reason and ("became 'step'" in report.reason) == (mode == "loop")
    with fastguard.enable(pipe, policy, capture=mode) as guard:
        call(pipe, steps=5)
        evaluations = len(pipe.scheduler.timesteps)
        assert sum(graph.replays for graph in guard.graphs()) == evaluations == 14, "three times four, and two"


def test_pndm_with_runge_kutta_steps_gives_stocks_images():
    pipe = runge_kutta()
    stock = call(pipe, steps=5)
    ours, _ = eager(pipe, steps=5)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())


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
