"""What cannot be recorded runs eagerly, with the images of an eager call and a reason in the report."""

from __future__ import annotations

import functools
import threading
from collections import namedtuple

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import hooks
from torch.overrides import TorchFunctionMode

import fastguard
from fastguard.capture.runner import BodyRunner
from fastguard.capture.static_inputs import signature
from tests import pipelines
from tests.capture.calls import call as two

pytestmark = pytest.mark.usefixtures("recorders")
CPU = torch.device("cpu")
call = functools.partial(two, steps=2, seeds=(3,))


def run(pipe, **options):
    with fastguard.enable(pipe, "cfg", **options) as guard:
        return call(pipe), guard.report


# Whatever runs Python in every forward --------------------------------------------------------------------------------------


class Moves(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


def accelerate_hook(pipe):
    add_hook_to_module(pipe.unet, Moves())
    return lambda: remove_hook_from_module(pipe.unet)


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe.remove_all_hooks


def sequential_offload(pipe):
    """What enable_sequential_cpu_offload does to a denoiser; transformers' text encoders cannot go that way on a CPU."""
    cpu_offload(pipe.unet, CPU, offload_buffers=True)


def group_offload(pipe):
    pipe.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def layerwise_casting(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def caching(pipe):
    """Attention of every second call is the one before it."""
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("attn1",),
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_pyramid_attention_broadcast(pipe.unet, config)


def forward_hook(pipe):
    return pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: None).remove


def dropout(pipe):
    pipe.unet.mid_block.dropout = torch.nn.Dropout(0.0).train()
    pipe.unet.mid_block.dropout.p = 0.1


EVERY = "runs Python in every forward"


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (accelerate_hook, f"Moves of accelerate on UNet2DConditionModel {EVERY} (offload)"),
        (model_offload, f"CpuOffload of accelerate on UNet2DConditionModel {EVERY} (offload)"),
        (sequential_offload, f"AlignDevicesHook of accelerate on UNet2DConditionModel {EVERY} (offload)"),
        (group_offload, f"group_offloading on Conv2d {EVERY} (group offload, caching, casting)"),
        (layerwise_casting, f"layerwise_casting on Conv2d {EVERY} (group offload, caching, casting)"),
        (caching, f"pyramid_attention_broadcast on Attention {EVERY} (group offload, caching, casting)"),
        (forward_hook, f"a forward hook on Conv2d {EVERY}"),
        (dropout, "a Dropout is in training mode"),
    ],
)
def test_what_runs_python_in_every_forward_stays_eager(obstacle, reason):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        before = call(pipe)
        assert guard.report.path == "fused, step graph"
        undo = obstacle(pipe)
        fastguard.enable(pipe, "cfg", capture="off")
        expected = call(pipe)
        assert torch.equal(before, expected) == (obstacle not in (layerwise_casting, caching)), "these change numbers"
        for mode in ("step", "loop", "auto"):
            fastguard.enable(pipe, "cfg", capture=mode)
            assert torch.equal(call(pipe), expected)
            assert guard.report.path == "fused" and reason in guard.report.reason, guard.report.reason
        if undo is not None:
            undo()
            assert torch.equal(call(pipe), before)
            assert guard.report.path == "fused, step graph", guard.report.reason


# Whatever is asked of a call ------------------------------------------------------------------------------------------------


Pair = namedtuple("Pair", "u c")


class Watched(torch.Tensor):
    """Latents of somebody who looks at every operation."""


def test_latents_that_somebody_watches(monkeypatch):
    pipe = pipelines.sd()
    expected, _ = run(pipe)
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: prepare(*args, **kwargs).as_subclass(Watched)
    for mode in ("step", "loop", "auto"):
        image, report = run(pipe, capture=mode)
        assert (report.path, report.reason) == ("fused", "latents are a Watched, which no graph can hold")
        assert torch.equal(torch.Tensor(image), expected), "of all rows, also where the stock loop was told of one"


class Halved(TorchFunctionMode):
    """Somebody else's attention, in the way that a library may put it there for a while."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func is F.scaled_dot_product_attention else result


@pytest.mark.parametrize("mode", ["step", "loop"])
def test_modes_of_torch_that_a_replay_would_not_ask(sd, mode):
    plain, _ = run(sd)
    with fastguard.enable(sd, "cfg", capture=mode) as guard:
        assert torch.equal(call(sd), plain) and guard.report.path == f"fused, {mode} graph"
        with Halved():
            other = call(sd)
            assert guard.report.path == "fused" and "runs under a Halved" in guard.report.reason
        with Halved(), fastguard.enable(sd, "cfg", capture="off"):
            assert torch.equal(other, call(sd)) and not torch.equal(other, plain)
        with torch.device("cpu"), fastguard.enable(sd, "cfg", capture=mode):
            assert torch.equal(call(sd), plain) and guard.report.path == f"fused, {mode} graph", (
                "a default device is harmless"
            )


def test_guidance_rescale_reads_an_output(sd):
    with fastguard.enable(sd, "cfg", capture="step") as guard:
        call(sd, guidance_rescale=0.5)
        assert guard.report.path == "own step" and "stays inside a graph" in guard.report.reason


def test_autocast_stays_eager(sd):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, report = run(sd, capture="step")
    assert report.path == "fused" and "autocast" in report.reason


def test_a_model_that_synchronises_falls_back_and_says_so(sd, monkeypatch):
    pipe = pipelines.sd()
    expected, _ = run(pipe)
    forward = pipe.unet.conv_in.forward
    pipe.unet.conv_in.forward = lambda x: forward(x) * (x.sum().item() * 0 + 1)
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        for mode in ("step", "loop", "step"):
            fastguard.enable(pipe, "cfg", capture=mode)
            assert torch.equal(call(pipe), expected)
            assert guard.report.path == "fused"
            assert "capture failed, everything runs eagerly from here on" in guard.report.reason


def test_graphs_from_before_a_failure_go(sd, recorders):
    """Nobody would replay them, and they hold memory."""
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        expected = call(pipe)
        assert len(guard.graphs()) == 1
        forward = pipe.unet.conv_in.forward
        pipe.unet.conv_in.forward = lambda x: forward(x) * (x.sum().item() * 0 + 1)
        assert torch.equal(call(pipe), expected)
        assert "capture failed" in guard.report.reason
        assert guard.graphs() == [] and guard.graphs.bytes == 0 and recorders[-1].tapes == []


@pytest.mark.parametrize("when", ["before the loop", "in the loop"])
def test_a_guard_that_is_disabled_during_a_call_leaves_no_graph(when, monkeypatch, recorders):
    pipe = pipelines.sd()
    expected, _ = run(pipe)
    guard = fastguard.enable(pipe, "cfg", capture="step")

    def disabling(function):
        @functools.wraps(function)
        def called(*args, **kwargs):
            result = function(*args, **kwargs)
            thread = threading.Thread(target=guard.disable)
            thread.start()
            thread.join()
            threads.append(thread)
            return result

        return called

    threads = []
    if when == "in the loop":
        monkeypatch.setattr(BodyRunner, "run", disabling(BodyRunner.run))
    else:
        pipe.encode_prompt = disabling(pipe.encode_prompt)
    assert torch.equal(call(pipe), expected)
    assert threads and guard.graphs() == [] and guard.graphs.bytes == 0
    assert all(recorder.tapes == [] for recorder in recorders)
    assert "given up while this call was running" in guard.report.reason


def test_arguments_that_nobody_can_compare_stay_eager(sd):
    assert signature(((torch.ones(1), 2.0, None), {"a": [{"b": "c"}]}), [])
    with pytest.raises(ValueError, match=r"arguments\[1\]\['cross_attention_kwargs'\]\['mask'\] is a object: nobody"):
        signature(((), {"cross_attention_kwargs": {"mask": object()}}), [])
    with pytest.raises(ValueError, match=r"arguments\[0\] is a Pair"):  # it may hold more than its items
        signature((Pair(1, 2),), [])


def test_calls_of_several_threads_follow_each_other():
    """Each gets its own image, all of them from the graphs of the first."""
    pipe = pipelines.sd()

    def one(scale):
        return call(pipe, guidance_scale=scale, steps=3)

    scales = [2.0, 4.0, 6.0]
    with fastguard.enable(pipe, "cfg", capture="step") as guard:
        alone = [one(s) for s in scales]
        results, reports = [None] * 3, [None] * 3
        barrier = threading.Barrier(3)

        def work(i):
            barrier.wait()
            results[i] = one(scales[i])
            reports[i] = guard.report

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, results, strict=True))
    assert all(report.path == "fused, step graph" for report in reports)
