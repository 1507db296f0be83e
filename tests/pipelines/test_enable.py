"""A guarded pipeline gives what a stock one gives, whatever it is called with. Stock itself is the reference throughout."""

from __future__ import annotations

import itertools

import diffusers
import pytest
import torch

import fastguard
from tests import pipelines
from tests.guarded import SCHEDULERS, SD_KINDS, call, mask, picture, same


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"negative_prompt": ["bad", "worse"]},
        {"num_images_per_prompt": 3},
        {"make": lambda: {"generator": pipelines.generators([1, 2])}},
        {"latents": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))},
        {"output_type": "pil"},
        {"output_type": "np"},
        {"output_type": "pt"},
        {"guidance_scale": 1.0},
        {"eta": 0.7},
        {"guidance_rescale": 0.6},
        {"prompt": "one cat", "height": 24, "width": 40},
    ],
    ids=lambda kwargs: next(iter(kwargs), "plain"),
)
def test_text_to_image(sd, kwargs):
    report = same(sd, **kwargs)
    assert report.path == ("own step" if "guidance_rescale" in kwargs else "fused")


def test_custom_sigmas_and_timesteps():
    pipe = pipelines.sd(scheduler=diffusers.EulerDiscreteScheduler(**pipelines.BETAS))
    same(pipe, sigmas=[14.0, 6.0, 2.0, 0.5])
    pipe = pipelines.sd(scheduler=diffusers.DPMSolverMultistepScheduler(**pipelines.BETAS))
    same(pipe, timesteps=[900, 700, 400, 100])


@pytest.mark.parametrize("scheduler", ["euler", "euler-ancestral", "dpm"])  # others refuse it themselves
def test_no_steps_at_all(scheduler):
    """Stock then returns the noise that it began with."""
    assert same(pipelines.sd(scheduler=SCHEDULERS[scheduler]()), num_inference_steps=0) is None


def test_float64_is_refused():
    with fastguard.enable(pipelines.sd().to(torch.float64), "cfg") as guard, pytest.raises(ValueError, match="float64"):
        call(guard._pipe)


def test_prompt_embeds(sd):
    embeds = torch.randn(2, 2, 16, 32, generator=torch.Generator().manual_seed(1))
    same(sd, prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])


def test_return_dict(sd):
    stock = sd("cat", num_inference_steps=2, output_type="latent", return_dict=False)
    with fastguard.enable(sd, "cfg"):
        ours = sd("cat", num_inference_steps=2, output_type="latent", return_dict=False)
    assert type(ours) is type(stock) is tuple and len(ours) == len(stock)


def test_thresholding_runs_its_own_step():
    pipe = pipelines.sd(scheduler=pipelines.ddim(thresholding=True))
    assert same(pipe).path == "own step"


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_hooked_step_still_sees_every_call(monkeypatch, where):
    """Then the table does not describe it: the guard decides and guides, the hooked step() does the rest."""
    pipe, seen = pipelines.sd(), []
    target = pipe.scheduler if where == "instance" else type(pipe.scheduler)
    step = target.step

    def hooked(*args, **kwargs):
        seen.append(int(args[-2]))
        return step(*args, **kwargs)

    monkeypatch.setattr(target, "step", hooked)
    report = same(pipe)
    assert report.path == "own step" and "replaced" in report.reason
    timesteps = pipe.scheduler.timesteps.tolist()
    assert seen == timesteps + timesteps


# Other pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", SD_KINDS)
def test_stable_diffusion_kinds(kind, scheduler):
    pipe = pipelines.sd(kind, scheduler=SCHEDULERS[scheduler]())
    same(pipe, **SD_KINDS[kind](), make=lambda: {"generator": pipelines.generators([1, 2])})


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("kind", SD_KINDS)
def test_sdxl_kinds(kind, scheduler):
    kind = kind.replace("StableDiffusion", "StableDiffusionXL")
    pipe = pipelines.sdxl(kind, scheduler=SCHEDULERS[scheduler]())
    same(
        pipe,
        **SD_KINDS[kind.replace("XL", "")](),
        make=lambda: {"generator": pipelines.generators([1, 2])},
    )


def test_inpaint_with_nine_channels():
    pipe = pipelines.sd("StableDiffusionInpaintPipeline", unet=pipelines.unet(in_channels=9))
    same(pipe, image=picture(), mask_image=mask(), height=32, width=32)


@pytest.mark.parametrize("xl", [False, True])
def test_controlnet_guess_mode(xl):
    make = pipelines.sdxl if xl else pipelines.sd
    kind = f"StableDiffusion{'XL' if xl else ''}ControlNetPipeline"
    same(make(kind), image=[picture(), picture(seed=1)], guess_mode=True)


def test_controlnet_with_a_skipped_branch():
    """Residuals of both branches reach a denoiser that runs one: values as of the pipeline with g = 0 written out."""
    pipe = pipelines.sd("StableDiffusionControlNetPipeline")
    kwargs = {"image": [picture(), picture(seed=1)], "num_inference_steps": 3}
    with fastguard.enable(pipe, "stp", t_star=0, monitor=True):
        both = call(pipe, **kwargs)
    with fastguard.enable(pipe, "stp", t_star=0) as guard:
        one = call(pipe, **kwargs)
        assert guard.report[0].denoiser_rows == 3
    torch.testing.assert_close(one, both, rtol=0, atol=1e-5 * both.abs().max().item())


@pytest.mark.parametrize("split", [0.5, 0.8])
def test_sdxl_denoising_end_and_start(split):
    """Base and refiner: an ensemble of experts, the second starting late from the first's latents."""
    base = pipelines.sdxl()
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base)
    refiner.set_progress_bar_config(disable=True)
    first = call(base, denoising_end=split, num_inference_steps=10)
    same(base, denoising_end=split, num_inference_steps=10)
    same(refiner, image=first, denoising_start=split, num_inference_steps=10)


def test_sdxl_clip_skip():
    same(pipelines.sdxl(), clip_skip=1)


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ],
)
def test_stable_diffusion_3(kind):
    kwargs = {} if kind == "StableDiffusion3Pipeline" else {"image": picture(), "strength": 0.8}
    if "Inpaint" in kind:
        kwargs["mask_image"] = mask()
    same(pipelines.sd3(kind), height=32, width=32, **kwargs)


@pytest.mark.parametrize("layers", [[0], []])
def test_stable_diffusion_3_refuses_skip_layer_guidance(layers):
    pipe = pipelines.sd3()
    with fastguard.enable(pipe, "cfg") as guard:
        call(pipe, height=32, width=32)
        assert guard.report is not None
        with pytest.raises(ValueError, match=rf"skip_guidance_layers=\[{'0' if layers else ''}\]"):
            call(pipe, height=32, width=32, skip_guidance_layers=layers)
        assert guard.report is None, "of a refused call there is none"


@pytest.mark.parametrize(
    "length", [{"num_inference_steps": 1}, {"timesteps": [400]}, {"num_inference_steps": 4}], ids=str
)
def test_pixart(length):
    single = length != {"num_inference_steps": 4}
    pipe = pipelines.pixart(scheduler=diffusers.DDPMScheduler(clip_sample=False) if single else None)
    report = same(
        pipe, prompt=None, negative_prompt=None, height=16, width=16, use_resolution_binning=False,
        **length, **pipelines.pixart_embeds(2),
    )  # fmt: skip
    assert report.path == ("own step" if single else "fused")


def test_guards_within_guards(sd):
    with fastguard.enable(sd, "dtp", gate=0.1) as outer:
        with fastguard.enable(sd, "cfg", capture="off") as inner:
            assert inner is outer and outer.policy.name == "cfg"
            with fastguard.enable(sd, "stp", gate=0.1):
                pass
            assert outer.policy.name == "cfg" and outer.options.capture == "off"
        assert outer.policy.name == "dtp" and outer.options.capture == "auto"
        call(sd)
        assert outer.report[0].policy.name == "dtp"
    assert "_fastguard_guard" not in vars(sd)
    guard = fastguard.enable(sd, "dtp", gate=0.1)
    fastguard.enable(sd, "cfg")
    call(sd)
    with guard:  # of a guard that has worked since, the end is the stock pipeline
        pass
    assert "_fastguard_guard" not in vars(sd)


def test_step_gets_other_arguments_than_the_calls(sd):
    """What `scheduler.step` is really called with decides, not what the call's own arguments let expect."""
    pipe = pipelines.sd()
    plain = call(pipe)
    pipe.prepare_extra_step_kwargs = lambda generator, eta: {"eta": 0.5, "generator": generator}
    same(pipe)
    assert not torch.equal(call(pipe), plain)


@pytest.mark.parametrize("batch", [1, 2])
def test_latents_in_any_layout(batch):
    pipe, shape = pipelines.sd(), (batch, 4, 8, 8)
    for order in itertools.permutations(range(4)):
        latents = torch.empty([shape[i] for i in order]).permute([order.index(i) for i in range(4)])
        latents.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(4)))
        assert latents.shape == shape
        same(pipe, prompt=["a red cat", "two dogs"][:batch], latents=latents, num_inference_steps=2)
