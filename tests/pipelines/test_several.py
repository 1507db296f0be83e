"""Several images, policies, threads and generators at once, and how many denoiser rows they take."""

from __future__ import annotations

import copy
import threading

import diffusers
import numpy as np
import pytest
import torch

import fastguard
from tests import pipelines
from tests.guarded import SCHEDULERS, SD_KINDS, call


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def test_four_policies_in_one_call_equal_four_calls(sd):
    policies = [
        "cfg",
        fastguard.policy("stp", t_star=600),
        "dtp",
        fastguard.policy("og+dtp", guidance_scale=6.0),
    ]
    kwargs = {"prompt": ["cat", "dog", "a", "red"], "num_inference_steps": 12}
    with fastguard.enable(sd, policies) as guard:
        together = call(sd, **kwargs, generator=pipelines.generators([1, 2, 3, 4]))
        batch = list(guard.report)
    for i, policy in enumerate(policies):
        with fastguard.enable(sd, policy, monitor=True) as guard:
            alone = call(
                sd,
                prompt=kwargs["prompt"][i],
                num_inference_steps=12,
                generator=pipelines.generators([i + 1]),
            )
            report = guard.report[0]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4 * alone.abs().max().item())
        assert (report.transition_step, report.forced) == (
            batch[i].transition_step,
            batch[i].forced,
        )
        np.testing.assert_allclose(report.d_curve, batch[i].d_curve, rtol=1e-4)


def test_policy_lists_follow_prompts_or_images(sd):
    policies = ["cfg", "dtp"]
    with fastguard.enable(sd, policies) as guard:
        call(sd, num_images_per_prompt=2)
        assert [r.policy.name for r in guard.report] == ["cfg", "cfg", "dtp", "dtp"]
        with pytest.raises(ValueError, match="2 values, but the batch has 3 images"):
            call(sd, prompt=["a", "b", "c"])
        with pytest.raises(ValueError, match="2 values, but the batch has 6 images"):
            call(sd, prompt=["a", "b", "c"], num_images_per_prompt=2)


def test_one_pass(sd):
    counts = []

    def count(module, args):
        counts.append(args[0].shape[0])

    count.only_looks = True
    handle = sd.unet.register_forward_pre_hook(count)
    try:
        for policy, share in (("cfg", 1.0), ("og+dtp", 1.0), ("stp", 0.75)):
            counts.clear()
            with fastguard.enable(sd, policy) as guard:
                call(sd, num_inference_steps=50)
                assert sum(counts) == share * 2 * 2 * 50
                assert guard.report[0].denoiser_rows == share * 2 * 50
    finally:
        handle.remove()


def _image_to_image():
    pipe = pipelines.sd("StableDiffusionImg2ImgPipeline", diffusers.DPMSolverMultistepScheduler(**pipelines.BETAS))
    return pipe, SD_KINDS["StableDiffusionImg2ImgPipeline"]()


# Their first latents are scaled (or noised) as the scheduler of this very call says.
CONCURRENT = {
    "sd": lambda: (pipelines.sd(scheduler=diffusers.EulerAncestralDiscreteScheduler(**pipelines.BETAS)), {}),
    "sdxl": lambda: (pipelines.sdxl(), {}),
    "image-to-image": _image_to_image,
}


@pytest.mark.parametrize("kind", CONCURRENT)
def test_concurrent_calls_do_not_disturb_each_other(kind):
    pipe, more = CONCURRENT[kind]()
    settings = [(4.0, 5), (7.0, 8), (2.0, 11), (9.0, 6)]
    if kind == "image-to-image":
        settings = [(scale, 2 * steps) for scale, steps in settings]  # strength 0.7 of them

    def one(scale, steps):
        return call(pipe, guidance_scale=scale, num_inference_steps=steps, **more)

    with fastguard.enable(pipe, "cfg") as guard:
        alone = [one(*s) for s in settings]
        results, reports = [None] * 4, [None] * 4
        barrier = threading.Barrier(4)

        def work(i):
            barrier.wait()
            for _ in range(3):
                results[i] = one(*settings[i])
                reports[i] = guard.report

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for result, expected, report, (_, steps) in zip(results, alone, reports, settings, strict=True):
        assert torch.equal(result, expected)
        assert len(report[0].timesteps) == (int(0.7 * steps) if more else steps)


def _callback(errors, other):
    def callback(pipe, step, timestep, kwargs):
        with pytest.raises(RuntimeError) as error:
            call(other(pipe))
        errors.append(str(error.value))
        return kwargs

    return callback


@pytest.mark.parametrize("through", ["argument", "original"])
def test_a_callback_that_calls_its_own_pipeline_is_told_what_to_do(sd, through):
    errors = []
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=_callback(errors, lambda pipe: pipe if through == "argument" else sd))
        call(sd)  # no lock is left behind
    assert len(errors) == 5 and "StableDiffusionPipeline(**pipe.components) with a scheduler of its own" in errors[0]


@pytest.mark.parametrize("scheduler", ["the original", "the stand-in"])
def test_another_pipeline_with_the_same_scheduler_in_a_callback(sd, scheduler):
    errors = []

    def other(pipe):
        shared = sd.scheduler if scheduler == "the original" else pipe.scheduler
        second = type(sd)(**{**sd.components, "scheduler": shared})
        fastguard.enable(second, "cfg")
        return second

    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=_callback(errors, other))
    assert "give that pipeline a scheduler of its own" in errors[0]


def test_what_the_error_recommends_works(sd):
    other = type(sd)(**{**sd.components, "scheduler": type(sd.scheduler).from_config(sd.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    inside = []

    def callback(pipe, step, timestep, kwargs):
        if step == 1:
            inside.append(call(other, num_inference_steps=9))
        return kwargs

    with fastguard.enable(sd, "cfg"), fastguard.enable(other, "cfg"):
        alone, inner = call(sd), call(other, num_inference_steps=9)
        outer = call(sd, callback_on_step_end=callback)
    assert torch.equal(inside[0], inner)
    torch.testing.assert_close(outer, alone, rtol=0, atol=1e-5 * alone.abs().max().item())


def test_pipelines_that_share_modules_run_at_the_same_time(sd):
    """Each with a scheduler of its own: what one does to the denoiser's stand-in, the other does not see."""
    pipes = []
    for _ in range(2):
        own = {
            "scheduler": type(sd.scheduler).from_config(sd.scheduler.config),
            "tokenizer": copy.deepcopy(sd.tokenizer),
        }
        pipes.append(type(sd)(**{**sd.components, **own}))
        pipes[-1].set_progress_bar_config(disable=True)
    meet, results = threading.Barrier(2, timeout=60), {}

    def run(i):
        def callback(pipe, step, timestep, kwargs):
            meet.wait()  # both are in their loops, row by row
            return kwargs

        results[i] = call(pipes[i], guidance_scale=2.0 + i, callback_on_step_end=callback)

    with fastguard.enable(pipes[0], "cfg"), fastguard.enable(pipes[1], "og+dtp"):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(2):
            assert torch.equal(
                results[i], call(pipes[i], guidance_scale=2.0 + i, callback_on_step_end=lambda *a: a[-1])
            )


def test_generators_end_where_stock_leaves_them(sd):
    for scheduler in (SCHEDULERS["euler-ancestral"], SCHEDULERS["ddim"]):
        pipe = pipelines.sd(scheduler=scheduler())
        ends = []
        for enabled in (False, True):
            generators = pipelines.generators([1, 2])
            with fastguard.enable(pipe, "cfg") if enabled else _nothing():
                call(pipe, generator=generators)
            ends.append([g.get_state() for g in generators])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *exception):
        return None
