"""What a guard refuses, and what it tells: calls that it cannot serve, policies that have nothing to do, results that are not finite."""

from __future__ import annotations

import dataclasses
import warnings

import diffusers
import pytest
import torch

import fastguard
from tests import guarded, pipelines
from tests.guarded import STEPS, call, picture


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def test_what_is_not_listed_is_refused(sd):
    parts = {k: v for k, v in sd.components.items() if k != "image_encoder"}
    pipe = diffusers.StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(TypeError, match="StableDiffusionPanoramaPipeline is not supported"):
        fastguard.enable(pipe, "cfg")

    class Own(diffusers.StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    with pytest.raises(TypeError, match="Own is not supported"):
        fastguard.enable(Own(**sd.components, requires_safety_checker=False), "cfg")


def test_guard_without_guidance_is_refused(sd):
    with (
        fastguard.enable(sd, "dtp", gate=0.1),
        pytest.raises(ValueError, match=r"guidance_scale=1\.0"),
    ):
        call(sd, guidance_scale=1.0)


def test_a_scale_of_the_policy_is_not_dropped_silently(sd):
    with (
        fastguard.enable(sd, "cfg", guidance_scale=[None, 5.0]),
        pytest.raises(ValueError, match="without a scale of its own"),
    ):
        call(sd, guidance_scale=1.0)


def test_a_gate_of_another_scheduler_dtype_or_number_of_steps_is_told_once(sd, caplog):
    """What the pipeline is when it is enabled, then the steps of the first call; not of the same policy again, nor of a gate of one's own."""
    kind = type(sd.scheduler).__name__
    known = {"model": "a/b", "scheduler": "HeunDiscreteScheduler", "dtype": "float16", "steps": STEPS + 1}
    own = dataclasses.replace(fastguard.policy("dtp", gate=0.1), name="own", provenance=known)

    def told():
        found = [r.message for r in caplog.records if "calibrated with" in r.message]
        caplog.clear()
        return found

    with fastguard.enable(sd, own):
        (said,) = told()
        assert f"scheduler HeunDiscreteScheduler, not {kind} and dtype float16, not float32:" in said
        call(sd)
        (said,) = told()
        assert f"with steps {STEPS + 1}, not {STEPS}:" in said
        call(sd)
        fastguard.enable(sd, own)
        call(sd)
        assert not told()
        fastguard.enable(sd, own, gate=0.2)
        call(sd)
        assert not told()
    with fastguard.enable(sd, [own, "cfg"]):
        (said,) = told()
        assert said.startswith("policy 'own' was calibrated with scheduler HeunDiscreteScheduler")
        call(sd)
        (said,) = told()
        assert f"with steps {STEPS + 1}, not {STEPS}:" in said
    here = {"scheduler": kind, "dtype": "float32", "steps": STEPS}
    with fastguard.enable(sd, dataclasses.replace(own, provenance=known | here)):
        call(sd)
        assert not told()


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.IPNDMScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.EulerDiscreteScheduler(**pipelines.BETAS, timestep_type="continuous", prediction_type="v_prediction"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_a_limit_in_training_steps_is_refused_where_timesteps_count_something_else(scheduler):
    pipe = pipelines.sd(scheduler=scheduler)
    for name, limit in (("stp", "t_star=500"), ("dtp", "deadline=600")):
        with fastguard.enable(pipe, name, gate=1e-9), pytest.raises(ValueError, match=f"{limit} counts training steps"):
            call(pipe)
    with fastguard.enable(pipe, "cfg"):
        plain = call(pipe)
    with fastguard.enable(pipe, "paper-dtp", gate=1e-9):
        assert not torch.equal(call(pipe), plain)


def test_a_guard_that_ends_before_it_begins_is_told():
    pipe = pipelines.sd("StableDiffusionImg2ImgPipeline")
    image = {"image": picture(), "strength": 0.4}
    for name, said in (("stp", 1), ("cfg", 0)):
        with warnings.catch_warnings(record=True) as found, fastguard.enable(pipe, name):
            warnings.simplefilter("always")
            call(pipe, **image)
        told = [w for w in found if "has no effect in this call: t_star=500" in str(w.message)]
        assert [w.filename for w in told] == [guarded.__file__] * said, "a warning points at the user's line"


def test_a_guard_that_outlasts_its_call_is_told():
    """The base model hands over to a refiner after timestep 601 (denoising_end=0.4) or 201 (0.8)."""
    pipe = pipelines.sdxl()
    for name, end, said in (
        ("stp", 0.4, 1),
        ("stp", 0.8, 0),
        ("stp", None, 0),
        ("dtp", 0.5, 0),
        ("dtp", 0.3, 1),
        ("cfg", 0.4, 0),
    ):
        with warnings.catch_warnings(record=True) as found, fastguard.enable(pipe, name) as guard:
            warnings.simplefilter("always")
            call(pipe, denoising_end=end, num_inference_steps=10)
        assert sum("does not end in this call" in str(w.message) for w in found) == said, (name, end)
        if name == "stp":
            assert (guard.report[0].transition_step is None) == bool(said)


def test_not_finite_is_told_where_one_branch_runs(sd):
    """Neither policy runs both branches in any row here, so no d could have shown it."""
    pipe = pipelines.sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with fastguard.enable(pipe, "stp", t_star=0) as guard:
        call(pipe)
        assert [image.non_finite for image in guard.report] == [STEPS - 1] * 2
        assert "NOT FINITE" in str(guard.report[0])
    with fastguard.enable(sd, "stp", t_star=0) as guard:
        call(sd)
        assert [image.non_finite for image in guard.report] == [None] * 2


def test_not_finite_is_told_where_the_schedulers_own_step_made_it():
    """The guided output is finite; stock's bh1 variant of UniPC makes NaN of it."""
    pipe = pipelines.sd(scheduler=diffusers.UniPCMultistepScheduler(**pipelines.BETAS, solver_type="bh1"))
    with fastguard.enable(pipe, "cfg") as guard:
        assert not torch.isfinite(call(pipe)).any()
        assert guard.report.path == "own step"
        assert [image.non_finite for image in guard.report] == [STEPS - 1] * 2
