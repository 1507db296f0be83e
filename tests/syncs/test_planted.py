"""Planted faults: a wait or a copy anywhere in a loop is found, with the line that causes it."""

from __future__ import annotations

import warnings

import pytest
import torch

import fastguard
from fastguard.loop.loop import Loop
from fastguard.syncs import probe
from fastguard.syncs.find import _sync_debug
from fastguard.syncs.stream import TO_DEVICE, TO_HOST, WAIT, Stream, Watching
from tests import pipelines

HERE = "test_planted.py"


def planted(report, kind, culprit):
    """The report's entries of one kind, all of them on the line of this file that holds `culprit`."""
    found = [line for line in report.lines() if line["kind"] == kind]
    assert found and all(HERE in line["line"] and culprit in line["code"] for line in found), report
    assert not report.free and culprit in str(report)
    return sum(line["count"] for line in found)


@pytest.fixture
def pipe():
    return pipelines.sd(scheduler=pipelines.ddim())


def test_pictures_are_refused_where_their_encoder_cannot_run():
    """Latents as `image` need no encoder; a picture does, and without its weights is refused in words that say so."""
    pipe = pipelines.sd("StableDiffusionImg2ImgPipeline", scheduler=pipelines.ddim())
    picture = torch.zeros(1, 3, 16, 16)
    arguments = {**probe.example_arguments(pipe), "strength": 0.6, "steps": 8}
    assert fastguard.find_syncs(pipe, image=torch.zeros(1, 4, 8, 8), **arguments).steps > 0
    assert fastguard.find_syncs(pipe, image=picture, **arguments).steps > 0
    pipe.vae.to("meta")
    with pytest.raises(ValueError, match="pictures may have to be given as latents"):
        fastguard.find_syncs(pipe, image=picture, **arguments)


FAULTS = {
    "item": (WAIT, "latents.max().item()", lambda latents: latents.max().item()),
    "truth": (WAIT, "if latents.sum() > 0", lambda latents: 1 if latents.sum() > 0 else 0),
    "mask": (WAIT, "latents[latents > 0]", lambda latents: latents[latents > 0]),
    "set by mask": (WAIT, "put_by_mask", lambda latents: put_by_mask(latents)),
    "to host": (TO_HOST, "latents.cpu()", lambda latents: latents.cpu()),
    "list": (TO_HOST, "latents.tolist()", lambda latents: latents.tolist()),
    "to device": (TO_DEVICE, "torch.ones(3).to(", lambda latents: torch.ones(3).to(latents.device)),
    "number to device": (TO_DEVICE, "torch.tensor(1.0", lambda latents: torch.tensor(1.0, device=latents.device)),
    "host index": (TO_DEVICE, "latents[torch.tensor([0])]", lambda latents: latents[torch.tensor([0])]),
}


def put_by_mask(latents):
    latents[latents > 9] = 0.0  # put_by_mask


@pytest.mark.parametrize("guarded", [False, True], ids=["stock", "guarded"])
@pytest.mark.parametrize("fault", FAULTS)
def test_in_a_callback(pipe, fault, guarded):
    kind, culprit, run = FAULTS[fault]

    def callback(pipe, step, timestep, kwargs):
        run(kwargs["latents"])
        return kwargs

    arguments = {**probe.example_arguments(pipe), "callback_on_step_end": callback}
    if not guarded:
        pipe.scheduler = _euler()
        assert planted(fastguard.find_syncs(pipe, **arguments), kind, culprit) == 4
        return
    with fastguard.enable(pipe, "cfg"):
        report = fastguard.find_syncs(pipe, **arguments)
        assert planted(report, kind, culprit) == 4
        with pytest.raises(AssertionError, match=HERE):
            fastguard.assert_sync_free(pipe, **arguments)


def _euler():
    """A scheduler whose own loop is free once it knows where it begins, as SDXL's pipeline tells it."""
    import diffusers

    class Euler(diffusers.EulerDiscreteScheduler):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.set_begin_index(0)

    return Euler(**pipelines.BETAS, steps_offset=1)


def test_the_scheduler_above_is_free(pipe):
    pipe.scheduler = _euler()
    assert fastguard.assert_sync_free(pipe).free


@pytest.mark.parametrize("fault", ["wait", "copy"])
def test_in_our_own_loop(pipe, monkeypatch, fault):
    advance = Loop.advance

    def slow(self, *args):
        if fault == "wait":
            assert float(self.trace[0, 0]) != 1.0
        else:
            self.rows.copy_(torch.zeros(self.rows.shape, dtype=torch.float64))
        return advance(self, *args)

    monkeypatch.setattr(Loop, "advance", slow)
    with fastguard.enable(pipe, "cfg"):
        report = fastguard.find_syncs(pipe)
    wait = fault == "wait"
    assert planted(report, WAIT if wait else TO_DEVICE, "float(self.trace" if wait else "self.rows.copy_(") == 4


def test_in_a_scheduler(pipe):
    class Peeking(type(pipe.scheduler)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            if model_output.abs().max().isnan():
                raise ValueError
            return super().step(model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler = Peeking.from_config(pipe.scheduler.config)
    report = fastguard.find_syncs(pipe)
    assert [line["count"] for line in report.lines() if HERE in line["line"]] == [4]
    assert "if model_output.abs().max().isnan():" in str(report)


def test_in_the_denoiser(pipe):
    class Peeking(type(pipe.unet)):
        def forward(self, sample, timestep, *args, **kwargs):
            if not torch.is_tensor(sample) or sample.mean() > 1e9:
                raise ValueError
            return super().forward(sample, timestep, *args, **kwargs)

    pipe.unet.__class__ = Peeking
    with fastguard.enable(pipe, "cfg"):
        report = fastguard.find_syncs(pipe)
    assert report.broke_off and planted(report, WAIT, "sample.mean() > 1e9") == 1
    assert report.lines()[0]["in_denoiser"]


def test_copies_that_do_not_wait_are_reported_as_such(pipe):
    def callback(pipe, step, timestep, kwargs):
        torch.ones(3).to(kwargs["latents"].device, non_blocking=True)
        return kwargs

    with fastguard.enable(pipe, "cfg"):
        report = fastguard.find_syncs(pipe, **probe.example_arguments(pipe), callback_on_step_end=callback)
    assert [op.blocking for op in report.ops] == [False] * 4


def test_noise_of_host_generators_is_brought_before_the_loop(pipe):
    """Stock copies it in every step, and waits."""
    import diffusers

    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler(**pipelines.BETAS, steps_offset=1)
    arguments = {**probe.example_arguments(pipe), "generator": torch.Generator().manual_seed(0)}
    stock = fastguard.find_syncs(pipe, **arguments)
    assert sum(op.sync is TO_DEVICE and op.blocking for op in stock.ops) == 4
    with fastguard.enable(pipe, "cfg"):
        fastguard.assert_sync_free(pipe, **arguments)


def test_the_pipeline_is_left_as_it_is(pipe):
    before = dict(vars(pipe)), dict(vars(pipe.scheduler)), {k: id(v) for k, v in pipe.unet.state_dict().items()}
    with fastguard.enable(pipe, "cfg"):
        fastguard.find_syncs(pipe)
    fastguard.find_syncs(pipe)
    assert (dict(vars(pipe)), dict(vars(pipe.scheduler))) == before[:2]
    assert all(parameter.device.type == "cpu" for parameter in pipe.unet.parameters())


def test_wrong_arguments_are_refused(pipe):
    with pytest.raises(ValueError, match="pass the arguments"):
        fastguard.find_syncs(pipelines.sd("StableDiffusionInpaintPipeline"))


# What runs on a GPU, rehearsed without one -----------------------------------------------------------------------------------


def test_sync_debug_warnings_become_operations(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    stream = Stream()
    stream.open = True
    with Watching(stream), _sync_debug(stream):
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)
        warnings.warn("something else", UserWarning, stacklevel=2)
    (op,) = stream.ops
    assert (op.sync, op.blocking) == (WAIT, True) and HERE in op.line and "warnings.warn" in op.code
    assert modes == ["warn", 0]


@pytest.mark.gpu
@pytest.mark.parametrize("guarded", [False, True], ids=["stock", "guarded"])
def test_on_a_gpu(pipe, guarded):
    pipe = pipe.to("cuda")
    if not guarded:
        report = fastguard.find_syncs(pipe)
        assert "alpha_prod_t = self.alphas_cumprod[timestep]" in {op.code for op in report.ops}
    else:
        with fastguard.enable(pipe, "cfg"):
            report = fastguard.assert_sync_free(pipe)
    assert report.technique == "gpu" and report.steps == 4
