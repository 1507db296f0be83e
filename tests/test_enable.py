"""A guarded pipeline behaves as a stock one in everything but the guard. Stock itself is the reference throughout."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import diffusers
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from PIL import Image

import fastguard
from tests import pipelines

STEPS = 5
CLOSE = {
    "rtol": 0,
    "atol": 1e-4,
}  # of the largest value; one update differs from stock's by rounding only


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


def call(pipe, **kwargs):
    defaults = {
        "prompt": ["a red cat", "two dogs"],
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    if "generator" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(3)
    return pipe(**{**defaults, **kwargs}).images


def same(pipe, **kwargs):
    """Stock and guarded outputs of equal calls; generators are made anew for each."""
    make = kwargs.pop("make", dict)
    stock = call(pipe, **kwargs, **make())
    with fastguard.enable(pipe, "cfg") as guard:
        ours = call(pipe, **kwargs, **make())
        report = guard.report
    assert type(ours) is type(stock)
    if isinstance(stock, list):
        ours, stock = (
            np.stack([np.asarray(i) for i in ours]) / 255,
            np.stack([np.asarray(i) for i in stock]) / 255,
        )
        tolerance = 1.01 / 255  # rounding to a byte
    else:
        tolerance = 1e-4
    ours, stock = (np.asarray(v, dtype=np.float64) for v in (ours, stock))
    assert ours.shape == stock.shape
    np.testing.assert_allclose(ours / np.abs(stock).max(), stock / np.abs(stock).max(), rtol=0, atol=tolerance)
    return report


def picture(size=32, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(size=32):
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[:, size // 2 :] = 255
    return Image.fromarray(pixels)


# Arguments of text-to-image -----------------------------------------------------------------------------------------------


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


# Other pipelines ------------------------------------------------------------------------------------------------------------

SD_KINDS = {
    "StableDiffusionImg2ImgPipeline": lambda: {"image": picture(), "strength": 0.7},
    "StableDiffusionInpaintPipeline": lambda: {
        "image": picture(),
        "mask_image": mask(),
        "height": 32,
        "width": 32,
    },
    "StableDiffusionControlNetPipeline": lambda: {"image": [picture(), picture(seed=1)]},
    "StableDiffusionControlNetImg2ImgPipeline": lambda: {
        "image": [picture()] * 2,
        "control_image": [picture(seed=1)] * 2,
        "strength": 0.7,
    },
    "StableDiffusionControlNetInpaintPipeline": lambda: {
        "image": [picture()] * 2,
        "mask_image": [mask()] * 2,
        "control_image": [picture(seed=1)] * 2,
    },
}
SCHEDULERS = {
    "ddim": pipelines.ddim,
    "euler": lambda: diffusers.EulerDiscreteScheduler(**pipelines.BETAS),
    "euler-ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**pipelines.BETAS),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**pipelines.BETAS),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**pipelines.BETAS),
}


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


def test_sdxl_guidance_rescale():
    assert same(pipelines.sdxl(), guidance_rescale=0.5).path == "own step"


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


def test_stable_diffusion_3_refuses_skip_layer_guidance():
    pipe = pipelines.sd3()
    with (
        fastguard.enable(pipe, "cfg"),
        pytest.raises(ValueError, match=r"skip_guidance_layers=\[0\]"),
    ):
        call(pipe, height=32, width=32, skip_guidance_layers=[0])


@pytest.mark.parametrize("steps", [1, 4])
def test_pixart(steps):
    pipe = pipelines.pixart(scheduler=diffusers.DDPMScheduler(clip_sample=False) if steps == 1 else None)
    same(
        pipe, prompt=None, negative_prompt=None, height=16, width=16, use_resolution_binning=False,
        num_inference_steps=steps, **pipelines.pixart_embeds(2),
    )  # fmt: skip


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


# Adapters -------------------------------------------------------------------------------------------------------------------


def test_lora():
    from peft import LoraConfig

    pipe = pipelines.sd()
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    same(pipe)
    same(pipe, cross_attention_kwargs={"scale": 0.3})
    stock = call(pipe)
    with fastguard.enable(pipe, "cfg"):
        pipe.unet.disable_adapters()
        without = call(pipe)
        pipe.unet.enable_adapters()
        with_adapter = call(pipe)
    assert (without - stock).abs().max() > 1e-3 * stock.abs().max()
    torch.testing.assert_close(with_adapter, stock, rtol=0, atol=1e-4 * stock.abs().max().item())


def test_textual_inversion():
    pipe = pipelines.sd(tokenizer=copy.deepcopy(pipelines.tokenizer()))
    embedding = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with fastguard.enable(pipe, "cfg"):
        plain = call(pipe, prompt="a <mine> cat")
        pipe.load_textual_inversion({"<mine>": embedding})
        assert not torch.equal(call(pipe, prompt="a <mine> cat"), plain)
    same(pipe, prompt="a <mine> cat")


def test_ip_adapter():
    encoder, processor = pipelines.image_encoder()
    pipe = pipelines.sd(image_encoder=encoder, feature_extractor=processor)
    pipe.unet._load_ip_adapter_weights([_ip_adapter_state(pipe.unet)])
    embeds = [torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2))]
    same(pipe, ip_adapter_image_embeds=embeds)
    pipe.set_ip_adapter_scale(0.4)
    same(pipe, ip_adapter_image=[[picture(), picture(seed=1)]])
    with fastguard.enable(pipe, "stp", t_star=0) as guard:  # one branch only: its half of the image embeddings
        call(pipe, ip_adapter_image_embeds=embeds)
        assert guard.report[0].denoiser_rows == STEPS


def _ip_adapter_state(unet):
    generator = torch.Generator().manual_seed(9)
    dim = unet.config.cross_attention_dim

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    projection = {
        "proj.weight": random(dim * 4, 32),
        "proj.bias": random(dim * 4),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    weights, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        module = unet.get_submodule(name.removesuffix(".processor"))
        for which in ("k", "v"):
            weights[f"{index}.to_{which}_ip.weight"] = random(module.to_k.out_features, dim)
        index += 2
    return {"image_proj": projection, "ip_adapter": weights}


# Callbacks and interrupts ---------------------------------------------------------------------------------------------------


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


def test_what_a_call_notes_on_the_pipeline_stays_readable(sd):
    with fastguard.enable(sd, "cfg"):
        call(sd, callback_on_step_end=_scale)
        assert sd.guidance_scale == 4.0 + STEPS
        assert sd.num_timesteps == STEPS
        assert len(sd.scheduler.timesteps) == STEPS


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
        after = call(sd)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4 * stock.abs().max().item())
    torch.testing.assert_close(after, call(sd), rtol=0, atol=1e-4 * stock.abs().max().item())


# Attaching and detaching ----------------------------------------------------------------------------------------------------


def test_identity_of_an_enabled_pipeline(sd, tmp_path):
    base, unet, scheduler = type(sd), sd.unet, sd.scheduler
    forward, before = unet.forward, dict(vars(scheduler))
    guard = fastguard.enable(sd, "cfg")
    assert type(sd) is not base and isinstance(sd, base)
    assert (type(sd).__name__, type(sd).__module__) == (base.__name__, base.__module__)
    assert inspect.signature(type(sd).__call__) == inspect.signature(base.__call__)
    call(sd)
    assert sd.unet is unet and sd.scheduler is scheduler and unet.forward == forward
    assert type(unet).__call__ is torch.nn.Module.__call__ and set(vars(scheduler)) == set(before)
    sd.save_pretrained(tmp_path)
    assert fastguard.enable(sd, "cfg") is guard
    guard.disable()
    assert type(sd) is base and "_fastguard_guard" not in vars(sd)
    guard.disable()  # twice does no harm

    loaded = base.from_pretrained(tmp_path, safety_checker=None)
    assert type(loaded) is base
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), call(sd))


def test_from_pipe_copies_and_pickles_are_stock(sd):
    with fastguard.enable(sd, "cfg"):
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(sd)
        assert type(other) is diffusers.StableDiffusionImg2ImgPipeline and other.unet is sd.unet
        twin = copy.deepcopy(sd)
        assert type(twin) is diffusers.StableDiffusionPipeline and "_fastguard_guard" not in vars(twin)
        auto = diffusers.AutoPipelineForInpainting.from_pipe(sd)
        assert type(auto) is diffusers.StableDiffusionInpaintPipeline
    assert torch.equal(call(twin), call(sd))


def test_pickle_is_stock():
    pipe = pipelines.sd()  # never called: transformers hangs hooks on a called text encoder that no pickle takes
    with fastguard.enable(pipe, "cfg"):
        loaded = pickle.loads(pickle.dumps(pipe))
    assert type(loaded) is diffusers.StableDiffusionPipeline and "_fastguard_guard" not in vars(loaded)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(call(loaded), call(pipe))


def test_environment_variable_switches_off(sd, monkeypatch):
    stock = call(sd)
    with fastguard.enable(sd, "stp") as guard:
        call(sd)
        assert guard.report is not None
        monkeypatch.setenv("FASTGUARD_DISABLE", "1")
        assert torch.equal(call(sd), stock)
        assert guard.report is None


def test_offload_hooks_run_and_stay(sd):
    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook = Counter()
    add_hook_to_module(sd.unet, hook)
    try:
        same(sd)
        assert hook.calls == 2 * STEPS
        with fastguard.enable(sd, "cfg"):
            call(sd)
            remove_hook_from_module(sd.unet)  # in any order
    finally:
        remove_hook_from_module(sd.unet)
    same(sd)


def test_a_failing_call_leaves_a_working_pipeline(sd):
    def fail(*args):
        raise KeyboardInterrupt

    with fastguard.enable(sd, "cfg"):
        with pytest.raises(KeyboardInterrupt):
            call(sd, callback_on_step_end=fail)
        after = call(sd)
    torch.testing.assert_close(after, call(sd), rtol=0, atol=1e-4 * after.abs().max().item())


def test_ungated_policy_warns_once(sd, caplog):
    with fastguard.enable(sd, "dtp"):
        fastguard.enable(sd, "dtp")
    assert sum("no gate" in r.message for r in caplog.records) == 1
    caplog.clear()
    with fastguard.enable(sd, "dtp", gate=0.1):
        pass
    assert not caplog.records


# Several at once ------------------------------------------------------------------------------------------------------------


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


def test_one_pass(sd):
    counts = []
    handle = sd.unet.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[0]))
    try:
        for policy, share in (("cfg", 1.0), ("og+dtp", 1.0), ("stp", 0.75)):
            counts.clear()
            with fastguard.enable(sd, policy) as guard:
                call(sd, num_inference_steps=50)
                assert sum(counts) == share * 2 * 2 * 50
                assert guard.report[0].denoiser_rows == share * 2 * 50
    finally:
        handle.remove()


def test_concurrent_calls_do_not_disturb_each_other():
    pipe = pipelines.sd(scheduler=diffusers.EulerAncestralDiscreteScheduler(**pipelines.BETAS))
    settings = [(4.0, 5), (7.0, 8), (2.0, 11), (9.0, 6)]

    def one(scale, steps):
        return call(pipe, guidance_scale=scale, num_inference_steps=steps)

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
        assert len(report[0].timesteps) == steps


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
