"""The user's own code around a guarded call: hooks on schedulers and denoisers, processors, callbacks that change what the call works with."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection, MultiIPAdapterImageProjection

import fastguard
from tests import pipelines
from tests.adapters import ip_adapter_state
from tests.guarded import STEPS, call, mask, picture, same

DPM, EULER, UNIPC = (
    diffusers.DPMSolverMultistepScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.UniPCMultistepScheduler,
)


def scaled(function, factor):
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


# The scheduler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        (DPM, "convert_model_output", {}),
        (DPM, "multistep_dpm_solver_second_order_update", {}),
        (UNIPC, "convert_model_output", {}),
        (EULER, "scale_model_input", {}),
        (diffusers.DDIMScheduler, "_get_variance", {"eta": 0.5}),
    ],
)
def test_what_step_calls_may_be_hooked_on_the_instance(kind, name, arguments):
    pipe = pipelines.sd(scheduler=kind(**pipelines.BETAS))
    plain = call(pipe, **arguments)
    setattr(pipe.scheduler, name, scaled(getattr(pipe.scheduler, name), 0.9))
    assert same(pipe, **arguments).reason == f"{name}() is replaced on the instance"
    assert not torch.allclose(call(pipe, **arguments), plain, rtol=1e-3)


@pytest.mark.parametrize(("kind", "name"), [(DPM, "convert_model_output"), (EULER, "scale_model_input")])
def test_what_is_patched_on_the_class_after_a_call_is_seen(monkeypatch, kind, name):
    pipe = pipelines.sd(scheduler=kind(**pipelines.BETAS))
    plain = call(pipe)
    same(pipe)
    monkeypatch.setattr(kind, name, scaled(getattr(kind, name), 0.9))
    same(pipe)
    assert not torch.allclose(call(pipe), plain, rtol=1e-3)


def respace(scheduler):
    index = scheduler.step_index
    scheduler.set_timesteps(2 * STEPS)
    scheduler._step_index = index


def edit(scheduler):
    scheduler.sigmas[2] *= 0.7


def replace(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.1


def hook(scheduler):
    vars(scheduler)["step"] = scaled(scheduler.step, 1)  # as on the original, whose state this is


@pytest.mark.parametrize(
    ("change", "named"),
    [(respace, "num_inference_steps"), (edit, "sigmas"), (replace, "alphas_cumprod"), (hook, "step")],
)
def test_a_scheduler_that_a_callback_changes_is_refused(change, named):
    pipe = pipelines.sd(scheduler=EULER(**pipelines.BETAS))

    def callback(pipe, step, t, values):
        if step == 1:
            change(pipe.scheduler)
        return values

    with (
        fastguard.enable(pipe, "cfg"),
        pytest.raises(RuntimeError, match=rf"pipe\.scheduler\.{named} was changed during a guarded call"),
    ):
        call(pipe, callback_on_step_end=callback)


class Elsewhere(torch.Tensor):
    """A schedule on another device than the latents: moving it gives another tensor."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        if func is torch.Tensor.to and "device" in (kwargs or {}):
            return plain[0].clone()
        if func == torch.Tensor.device.__get__:
            return torch.device("meta")
        return func(*plain, **(kwargs or {}))


def test_a_schedule_that_stock_moves_in_the_loop_is_no_change():
    """add_noise of inpaint's blending moves alphas_cumprod to the latents' device, once."""
    pipe = pipelines.sd("StableDiffusionInpaintPipeline")
    plain = pipe.scheduler.alphas_cumprod.clone()
    arguments = {"image": [picture()] * 2, "mask_image": [mask()] * 2, "strength": 1.0}
    with fastguard.enable(pipe, "cfg") as guard:
        for _ in range(2):
            pipe.scheduler.alphas_cumprod = plain.clone().as_subclass(Elsewhere)
            call(pipe, **arguments, callback_on_step_end=lambda pipe, step, t, values: values)
            assert guard.report.path == "fused"
            assert type(pipe.scheduler.alphas_cumprod) is torch.Tensor, "it was not moved: this test tests nothing"


def test_what_a_callback_keeps_on_the_scheduler_is_its_own():
    def callback(pipe, step, t, values):
        pipe.scheduler.my_last_step = step
        return values

    pipe = pipelines.sd()
    for _ in range(2):
        assert same(pipe, callback_on_step_end=callback).path == "fused"


def test_a_pipeline_that_scales_no_input_gets_none_scaled():
    """Stable Diffusion 3 never asks its scheduler to, whichever it is."""
    same(pipelines.sd3(scheduler=EULER(**pipelines.BETAS)), height=32, width=32)


# Guidance --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1.0, 0.0, 0.5])
def test_guidance_that_a_callback_switches_on(start):
    def callback(pipe, step, t, values):
        if step == 1:
            pipe._guidance_scale = 5.0
            embeds = values["prompt_embeds"]
            return {"prompt_embeds": torch.cat([torch.zeros_like(embeds), embeds])}
        return {}

    same(
        pipelines.sd(),
        guidance_scale=start,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )


def test_guidance_that_a_callback_switches_off_and_on():
    kept = {}

    def callback(pipe, step, t, values):
        if step == 1:
            kept["embeds"], pipe._guidance_scale = values["prompt_embeds"], 1.0
            return {"prompt_embeds": values["prompt_embeds"].chunk(2)[1]}
        if step == 3:
            pipe._guidance_scale = 7.5
            return {"prompt_embeds": kept["embeds"]}
        return {}

    same(
        pipelines.sd(),
        num_inference_steps=8,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )


def test_what_the_pipeline_never_forms_is_refused():
    pipe = pipelines.sd()
    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "noise_pred"]
    with fastguard.enable(pipe, "cfg"), pytest.raises(ValueError, match="tensor_inputs holds 'noise_pred'"):
        call(
            pipe,
            callback_on_step_end=lambda pipe, step, t, values: values,
            callback_on_step_end_tensor_inputs=["latents", "noise_pred"],
        )


# The denoiser ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionControlNetPipeline"])
def test_hooks_may_keep_the_inputs_that_they_see(kind):
    pipe = pipelines.sd(kind)
    arguments = {"image": [picture()] * 2} if "ControlNet" in kind else {}
    model = pipe.controlnet if "ControlNet" in kind else pipe.unet.conv_in
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    call(pipe, **arguments)
    stock, seen[:] = list(seen), []
    with fastguard.enable(pipe, "cfg"):
        call(pipe, **arguments)
    assert len(seen) == len(stock) == STEPS
    for ours, theirs in zip(seen, stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


def test_a_hook_of_all_modules_may_keep_them_too():
    pipe, seen = pipelines.sd(), []

    def keep(module, inputs):
        if module is pipe.unet.conv_in:
            seen.append(inputs[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(keep)
    try:
        call(pipe)
        stock, seen[:] = list(seen), []
        same(pipe)
        ours = seen[-STEPS:]  # after another stock call
    finally:
        handle.remove()
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())


def one_branch_equals_both(pipe, **arguments):
    with fastguard.enable(pipe, "stp", monitor=True):
        both = call(pipe, **arguments)
    with fastguard.enable(pipe, "stp") as guard:
        one = call(pipe, **arguments)
        rows = guard.report[0].denoiser_rows
    torch.testing.assert_close(one, both, rtol=0, atol=1e-5 * both.abs().max().item())
    return rows


def test_a_tensor_for_the_processors_is_not_cut():
    """Two of whatever it is for one prompt: as long as the two branches."""

    class Regions(AttnProcessor):
        def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None, temb=None, regions=None):
            plain = super().__call__(attn, hidden, encoder_hidden_states, attention_mask, temb)
            return plain * (1 + 0.3 * regions["weights"].sum())

    pipe = pipelines.sd()
    pipe.unet.set_attn_processor(Regions())
    given = {"cross_attention_kwargs": {"regions": {"weights": torch.ones(2)}}}
    assert one_branch_equals_both(pipe, prompt="a cat", **given) == 2 * STEPS


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_a_scale_is_no_reason_to_run_both_branches(scale):
    pipe = pipelines.sd()
    assert one_branch_equals_both(pipe, cross_attention_kwargs={"scale": scale}) < 2 * STEPS


def test_face_id_embeds_on_the_module_are_not_cut():
    encoder, processor = pipelines.image_encoder()
    pipe = pipelines.sd(image_encoder=encoder, feature_extractor=processor)
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet)])
    torch.manual_seed(0)
    projection = IPAdapterFaceIDPlusImageProjection(
        embed_dims=32, output_dims=32, hidden_dims=24, id_embeddings_dim=16, depth=1, dim_head=8, heads=2, num_tokens=4
    )
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    projection.clip_embeds = torch.randn(2, 1, 5, 24)  # [negative, positive]
    embeds = [torch.randn(2, 1, 16)]
    assert one_branch_equals_both(pipe, prompt="a cat", ip_adapter_image_embeds=embeds) == 2 * STEPS
    same(pipe, prompt="a cat", ip_adapter_image_embeds=embeds)


# The guard -------------------------------------------------------------------------------------------------------------


def test_a_guard_that_was_taken_off_takes_off_no_other():
    pipe = pipelines.sd()
    first = fastguard.enable(pipe, "cfg")
    first.disable()
    second = fastguard.enable(pipe, "cfg")
    first.disable()
    call(pipe)
    assert second.report is not None
    second.disable()
    assert type(pipe) is diffusers.StableDiffusionPipeline
