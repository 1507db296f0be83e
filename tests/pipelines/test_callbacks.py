"""Callbacks and interrupts under the guard: what they see, what they may change, what stays readable after them."""

from __future__ import annotations

import contextlib
import copy
import warnings

import diffusers
import pytest
import torch

import fastguard
from tests import pipelines, schedulers
from tests.guarded import SCHEDULERS, SD_KINDS, STEPS, call, same


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def test_callback_sees_every_step(sd):
    def collector(seen):
        def callback(pipe, step, timestep, kwargs):
            seen.append((step, int(timestep), kwargs["latents"]))
            return kwargs

        return callback

    stock, ours = [], []
    call(sd, callback_on_step_end=collector(stock))
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=collector(ours))
    assert [s[:2] for s in ours] == [s[:2] for s in stock]
    for (_, _, a), (_, _, b) in zip(ours, stock, strict=True):  # kept latents are not overwritten by later steps
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


def _replace(pipe, step, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.5}


def _in_place(pipe, step, timestep, kwargs):
    kwargs["latents"].mul_(0.5)
    return {}


def _scale(pipe, step, timestep, kwargs):
    pipe._guidance_scale += 1.0
    return {}


def _cut_off(pipe, step, timestep, kwargs):
    if step != 2:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}


@pytest.mark.parametrize("callback", [_replace, _in_place, _scale, _cut_off], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_callback_changes_are_honoured(callback, scheduler):
    pipe = pipelines.sd(scheduler=SCHEDULERS[scheduler]())
    same(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )


def _at_two_steps(pipe, step, timestep, kwargs):
    return {"latents": kwargs["latents"] * 0.5} if step in (2, 4) else {}


def _at_the_first(pipe, step, timestep, kwargs):
    if step == 0:
        kwargs["latents"].mul_(0.5)
    return {}


@pytest.mark.parametrize("callback", [_at_two_steps, _at_the_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", schedulers.SD)
def test_every_scheduler_goes_on_from_changed_latents(name, callback):
    """Some go back to latents of an earlier row, as they were before the change: no table can know which."""
    pipe = pipelines.sd(scheduler=schedulers.SD[name]())
    report = same(pipe, callback_on_step_end=callback, num_inference_steps=10)
    goes_back = name.startswith(("unipc", "sa-solver", "dpm-single", "heun", "kdpm2", "pndm"))
    assert report.path == ("own step" if goes_back else "fused"), report.reason
    assert not goes_back or "latents of an earlier row" in report.reason


@pytest.mark.parametrize("name", schedulers.FLOW)
def test_a_flow_goes_on_from_changed_latents(name):
    same(pipelines.sd3(scheduler=schedulers.FLOW[name]()), callback_on_step_end=_at_two_steps, num_inference_steps=8)


@pytest.mark.parametrize("policy", ["cfg", "dtp"])
def test_a_guard_that_ends_with_the_guidance_says_so(sd, policy):
    with (
        warnings.catch_warnings(record=True) as said,
        fastguard.enable(sd, policy, **({} if policy == "cfg" else {"gate": 1e-6})),
    ):
        warnings.simplefilter("always")
        call(sd, callback_on_step_end=_cut_off, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    off = [str(w.message) for w in said if "the second branch ended" in str(w.message)]
    assert off == [] if policy == "cfg" else len(off) == 1 and "row 3" in off[0]


@pytest.mark.parametrize("kind", [name for name in SD_KINDS if "ControlNet" in name])
def test_a_scale_is_followed_where_stock_follows_it(kind):
    """Most ControlNet pipelines combine with their argument: a callback changes what they show and nothing else."""
    same(
        pipelines.sd(kind),
        **SD_KINDS[kind](),
        callback_on_step_end=_scale,
        controlnet_conditioning_scale=1.0,
    )


def test_what_a_call_notes_on_the_pipeline_stays_readable(sd):
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=_scale)
        assert sd.guidance_scale == 4.0 + STEPS
        assert sd.num_timesteps == STEPS
        assert len(sd.scheduler.timesteps) == STEPS


def _outer_scale(pipe, outer):
    outer._guidance_scale += 20.0


def _outer_vae(pipe, outer):
    outer.vae = copy.deepcopy(outer.vae)
    with torch.no_grad():
        outer.vae.decoder.conv_out.bias.add_(0.5)


@pytest.mark.parametrize("change", [_outer_scale, _outer_vae], ids=lambda f: f.__name__)
def test_changes_of_the_original_are_honoured(change):
    """A callback may use the pipeline that it closed over in place of its argument."""

    def images(guarded):
        pipe = pipelines.sd()

        def callback(argument, step, timestep, kwargs):
            if step == 1:
                change(argument, pipe)
            return kwargs

        with fastguard.enable(pipe, "cfg") if guarded else contextlib.nullcontext():
            plain = call(pipe, output_type="pt")
            return plain, call(pipe, output_type="pt", callback_on_step_end=callback)

    _, ours = images(True)
    plain, stock = images(False)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
    assert (stock - plain).abs().max() > 1e-2, "the change is one"


def test_the_original_shows_the_call_that_is_running(sd):
    seen = []

    def callback(pipe, step, timestep, kwargs):
        seen.append((sd.guidance_scale, sd.num_timesteps, pipe.guidance_scale))
        return kwargs

    with fastguard.enable(sd, "cfg"):
        call(sd, guidance_scale=3.5, callback_on_step_end=callback)
        call(sd, guidance_scale=2.5, num_inference_steps=4, callback_on_step_end=callback)
    assert seen == [(3.5, STEPS, 3.5)] * STEPS + [(2.5, 4, 2.5)] * 4


@pytest.mark.parametrize("name", ["scheduler", "unet"])
@pytest.mark.parametrize("through", ["argument", "original"])
def test_a_part_that_is_replaced_in_the_loop_is_refused(name, through):
    """The guard's arithmetic belongs to the scheduler and the denoiser with which the call began."""
    pipe = pipelines.sd()
    other = getattr(pipelines.sd(), name)

    def callback(argument, step, timestep, kwargs):
        setattr(argument if through == "argument" else pipe, name, other)
        return kwargs

    with (
        fastguard.enable(pipe, "cfg"),
        pytest.raises(RuntimeError, match=rf"StableDiffusionPipeline.{name} was replaced during a guarded call"),
    ):
        call(pipe, callback_on_step_end=callback)
    if through == "argument":
        assert pipe.config[name][1] == type(getattr(pipe, name)).__name__, "and is not noted for save_pretrained"


def test_the_pipeline_of_a_callback_is_one_for_everybody_else():
    """It can be enabled, and copies of what it holds are copies of the originals."""
    pipe = pipelines.sd()
    copies = []

    def callback(argument, step, timestep, kwargs):
        fastguard.enable(argument, "cfg")
        copies.extend(copy.deepcopy(part) for part in (argument.unet, argument.scheduler))
        return kwargs

    with fastguard.enable(pipe, "cfg"):
        call(pipe, num_inference_steps=1, callback_on_step_end=callback)
    unet, scheduler = copies
    assert (type(unet), type(scheduler)) == (type(pipe.unet), type(pipe.scheduler))
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), pipe.unet.parameters(), strict=True))


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_the_denoiser_out_of_its_turn_is_refused(sd, step):
    """The stand-in works for the loop; that of the original pipeline is anybody's."""
    outputs = []

    def callback(pipe, at, timestep, kwargs):
        if at == step:
            embeddings = torch.zeros(2, 16, 32)
            outputs.append(sd.unet(kwargs["latents"], timestep, embeddings, return_dict=False)[0])
            pipe.unet(kwargs["latents"], timestep, embeddings, return_dict=False)
        return kwargs

    with fastguard.enable(sd, "cfg"), pytest.raises(RuntimeError, match="unet was called outside its turn"):
        call(sd, callback_on_step_end=callback)
    assert outputs[0].abs().max() > 0


def test_rescaling_that_begins_in_the_loop_is_refused(sd):
    def callback(pipe, step, timestep, kwargs):
        pipe._guidance_rescale = 0.7
        return kwargs

    with fastguard.enable(sd, "cfg"), pytest.raises(RuntimeError, match="guidance_rescale was switched on"):
        call(sd, callback_on_step_end=callback)


def test_a_part_may_be_set_to_itself(sd):
    def callback(pipe, step, timestep, kwargs):
        pipe.unet = pipe.unet
        pipe.scheduler = pipe.scheduler
        return kwargs

    same(sd, callback_on_step_end=callback)


@pytest.mark.parametrize("through", ["argument", "original"])
def test_interrupt(sd, through):
    def callback(pipe, step, timestep, kwargs):
        if step == 2:
            (pipe if through == "argument" else sd)._interrupt = True
        return kwargs

    stock = call(sd, callback_on_step_end=callback)
    with fastguard.enable(sd, "cfg") as guard:
        ours = call(sd, callback_on_step_end=callback)
        assert guard.report[0].denoiser_rows == 2 * 3
        assert sd.interrupt, "as in stock, until the next call"
        after = call(sd)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())
    torch.testing.assert_close(after, call(sd), rtol=0, atol=1e-4 * stock.abs().max().item())


def test_what_is_built_of_a_callbacks_pipeline_has_the_originals(sd):
    built = []

    def callback(pipe, step, timestep, kwargs):
        if step == 1:
            built.append(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe))
            built.append(diffusers.StableDiffusionPipeline(**pipe.components))
        return kwargs

    stock = call(sd)
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=callback)
        assert sd.components["unet"] is sd.unet
    for pipe in built:
        assert all(getattr(pipe, name) is getattr(sd, name) for name in ("unet", "scheduler", "tokenizer", "vae"))
    built[1].set_progress_bar_config(disable=True)
    torch.testing.assert_close(call(built[1]), stock, rtol=0, atol=0)
