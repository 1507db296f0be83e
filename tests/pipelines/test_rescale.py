"""guidance_rescale in every pipeline that takes it: stock's image, by the scheduler's own step."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

import fastguard
from fastguard.pipelines.families import FAMILIES
from tests import pipelines
from tests.guarded import STEPS, call, mask, picture, same


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


RESCALED = {
    "StableDiffusionPipeline": (pipelines.sd, dict),
    "StableDiffusionXLPipeline": (pipelines.sdxl, dict),
    "StableDiffusionXLImg2ImgPipeline": (pipelines.sdxl, lambda: {"image": picture(), "strength": 0.7}),
    "StableDiffusionXLInpaintPipeline": (pipelines.sdxl, lambda: {"image": picture(), "mask_image": mask()}),
    "StableDiffusionXLControlNetInpaintPipeline": (
        pipelines.sdxl,
        lambda: {"image": picture(), "mask_image": mask(), "control_image": picture(seed=1)},
    ),
}


def test_every_pipeline_that_rescales_is_among_these():
    takes = {
        name
        for family in FAMILIES
        for name in family.pipelines
        if "guidance_rescale" in inspect.signature(getattr(diffusers, name).__call__).parameters
    }
    assert takes == {*RESCALED, "StableDiffusionXLControlNetUnionInpaintPipeline"}  # as the one without Union


@pytest.mark.parametrize("kind", RESCALED)
def test_guidance_rescale(kind):
    make, images = RESCALED[kind]
    pipe, more = make(kind), {"prompt": "a red cat", "height": 32, "width": 32, **images()}
    if "Img2Img" in kind:
        del more["height"], more["width"]
    assert same(pipe, guidance_rescale=0.7, guidance_scale=15.0, **more).path == "own step"
    plain = call(pipe, guidance_scale=15.0, **more)
    assert not torch.equal(plain, call(pipe, guidance_scale=15.0, guidance_rescale=0.7, **more))


def test_rescaling_under_a_guard_that_runs_one_branch(sd):
    """Lin et al. rescale by the conditional output's standard deviation: it runs although zero guidance would not need it."""
    phi, seen = 0.6, []
    hook = sd.unet.register_forward_hook(lambda module, inputs, output: seen.append(output[0].double()))
    try:
        with fastguard.enable(sd, "stp", t_star=0) as guard:
            ours = call(sd, guidance_rescale=phi)
    finally:
        hook.remove()
    assert guard.report[0].denoiser_rows == 2 * STEPS
    scheduler = pipelines.ddim()
    scheduler.set_timesteps(STEPS)
    x = torch.randn(2, *seen[0].shape[1:], generator=torch.Generator().manual_seed(3)).double()
    for t, output in zip(scheduler.timesteps, seen, strict=True):
        u, c = output.chunk(2)  # zero guidance: e = u
        std = [v.std(dim=(1, 2, 3), keepdim=True) for v in (c, u)]
        x = scheduler.step(phi * u * std[0] / std[1] + (1 - phi) * u, t, x).prev_sample
    torch.testing.assert_close(ours.double(), x, rtol=0, atol=1e-5 * x.abs().max().item())
