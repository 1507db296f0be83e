"""Pipelines whose guidance is a guider's: what must hold for every family, with the guiders that people put there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import fastguard
from fastguard.pipelines import guard as guards
from fastguard.pipelines.probe import probe
from tests.families.tiny import embeds, euler, parts, seeded

if not hasattr(diffusers, "MotifVideoPipeline"):
    pytest.skip("these pipelines came with diffusers 0.36 and later", allow_module_level=True)
from fastguard.fronts.guider import GuardedGuidance

STEPS = 4
MASKED = {"prompt_embeds": (2, 6, 16), "prompt_embeds_2": (2, 5, 16)}


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=8,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()


def hunyuan_video(name: str = "HunyuanVideo15Pipeline") -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=8,
            rope_axes_dim=(2, 2, 4),
            target_size=32,
            task_type="t2v",
        )
    )
    pipe = parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), vae=hunyuan_vae())
    pipe.vision_num_semantic_tokens = 3
    return pipe


def hunyuan_video_image() -> Any:
    pipe = hunyuan_video("HunyuanVideo15ImageToVideoPipeline")
    image_embeds = embeds(9, image_embeds=(2, 3, 8))["image_embeds"]
    pipe.encode_image = lambda **_: image_embeds
    return pipe


def hunyuan_image(name: str = "HunyuanImagePipeline", channels: int = 4, **config: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.HunyuanImageTransformer2DModel(
            in_channels=channels,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            **{"text_embed_2_dim": 16, "rope_axes_dim": (4, 4), **config},
        )
    )
    return parts(getattr(diffusers, name), transformer=transformer, scheduler=euler())


def refiner() -> Any:
    return hunyuan_image(
        "HunyuanImageRefinerPipeline",
        channels=8,
        text_embed_2_dim=None,
        rope_axes_dim=(2, 2, 4),
        patch_size=(1, 1, 1),
        guidance_embeds=True,
    )


def motif(name: str = "MotifVideoPipeline") -> Any:
    transformer = seeded(
        lambda: diffusers.MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(2, 2, 4),
        )
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return parts(getattr(diffusers, name), transformer=transformer, scheduler=euler(), vae=vae.eval())


def _picture() -> Any:
    from PIL import Image

    return Image.new("RGB", (32, 32), (200, 40, 90))


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    shapes: dict[str, tuple[int, ...]]
    fixed: dict[str, Any]
    elements: int
    mask: str = "prompt_embeds_mask"  # of "prompt_embeds"; that of "prompt_embeds_2" ends as it does


CASES = {
    "hunyuan-video 1.5": Case(hunyuan_video, MASKED, {"height": 32, "width": 32, "num_frames": 5}, 4 * 2 * 4 * 4),
    "hunyuan-video 1.5, image": Case(
        hunyuan_video_image, MASKED, {"image": _picture(), "num_frames": 5}, 4 * 2 * 4 * 4
    ),
    "hunyuan-image": Case(hunyuan_image, MASKED, {"height": 256, "width": 256}, 4 * 8 * 8),
    "hunyuan-image refiner": Case(
        refiner,
        {"prompt_embeds": (2, 6, 16)},
        {"height": 64, "width": 64, "image": torch.ones(2, 4, 1, 4, 4)},
        4 * 4 * 4,
    ),
    "motif": Case(
        motif,
        {"prompt_embeds": (2, 6, 16)},
        {"height": 32, "width": 32, "num_frames": 5},
        4 * 2 * 4 * 4,
        mask="prompt_attention_mask",
    ),
}
GUIDERS = {
    "CFG": lambda: diffusers.ClassifierFreeGuidance(4.0),
    "CFG, rescaled": lambda: diffusers.ClassifierFreeGuidance(4.0, guidance_rescale=0.7),
    "APG": lambda: diffusers.AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5),
    "APG mix": lambda: diffusers.AdaptiveProjectedMixGuidance(4.0),
}
"""As many as show that none is taken for another; every pipeline runs with CFG and with a momentum."""


def branch(case: Case, seed: int, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, tensor in embeds(seed, **case.shapes).items():
        end = name.removeprefix("prompt_embeds")
        found[f"{prefix}{name}"] = tensor
        found[f"{prefix}{case.mask}{end}"] = torch.ones(tensor.shape[:2], dtype=torch.int64)
    return found


def arguments(case: Case) -> dict[str, Any]:
    return {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "return_dict": False,
        "generator": [torch.Generator().manual_seed(seed) for seed in (5, 6)],
        **case.fixed,
        **branch(case, 1),
        **branch(case, 2, "negative_"),
    }


def run(case: Case, pipe: Any, **changes: Any) -> torch.Tensor:
    return pipe(**{**arguments(case), **changes})[0]


def guarded(case: Case, pipe: Any, policy: Any = "stp", **overrides: Any) -> tuple[torch.Tensor, Any]:
    with fastguard.enable(pipe, policy, **overrides) as guard:
        return run(case, pipe), guard.report


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {}


@pytest.fixture(params=CASES)
def case(request: Any, pipes: dict[str, Any]) -> tuple[Case, Any]:
    chosen = CASES[request.param]
    pipe = pipes.setdefault(request.param, None) or chosen.make()
    pipes[request.param] = pipe
    pipe.guider = diffusers.ClassifierFreeGuidance(4.0)
    return chosen, pipe


@pytest.mark.parametrize("guider", GUIDERS)
def test_unguarded_images_keep_the_guiders_bits(case: Any, guider: str) -> None:
    tiny, pipe = case
    pipe.guider = GUIDERS[guider]()
    stock = run(tiny, pipe)
    ours, report = guarded(tiny, pipe, "cfg")
    assert torch.equal(ours, stock)
    assert report[0].elements == tiny.elements and report[0].denoiser_rows == 2 * STEPS
    zero, _ = guarded(tiny, pipe, t_star=0)
    mixed, _ = guarded(tiny, pipe, [fastguard.policy("stp", t_star=0), "cfg"])
    assert torch.equal(mixed[0], zero[0]) and torch.equal(mixed[1], stock[1])
    assert not torch.equal(zero, stock)


def test_zero_and_conditional_are_stock_on_one_prompt(case: Any) -> None:
    tiny, pipe = case
    zero, _ = guarded(tiny, pipe, t_star=0)
    conditional, _ = guarded(tiny, pipe, t_star=0, before="conditional", monitor=True)
    pipe.guider = diffusers.ClassifierFreeGuidance(1.0)  # runs one branch
    assert torch.equal(zero, run(tiny, pipe, **branch(tiny, 2)))
    expected = run(tiny, pipe)
    torch.testing.assert_close(conditional / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=2e-6)


def test_d_is_the_distance_of_the_two_predictions(case: Any) -> None:
    tiny, pipe = case
    outputs: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
    try:
        _, report = guarded(tiny, pipe, "cfg")
    finally:
        hook.remove()
    for row, (c, u) in enumerate(zip(outputs[::2], outputs[1::2], strict=True)):
        d = (c.double() - u.double()).flatten(1).square().sum(1)
        assert [image.d_curve[row] for image in report] == pytest.approx(d.tolist(), rel=1e-5)


@pytest.mark.parametrize(("original", "effective"), [(False, 4.0), (True, 5.0)])
def test_opposite_has_the_guiders_effective_scale(case: Any, original: bool, effective: float) -> None:
    tiny, pipe = case
    pipe.guider = diffusers.ClassifierFreeGuidance(4.0, use_original_formulation=original)
    ours, _ = guarded(tiny, pipe, "og+stp", before="opposite", t_star=0)
    pipe.guider = diffusers.ClassifierFreeGuidance(-effective)
    expected = run(tiny, pipe)
    torch.testing.assert_close(ours / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


def test_a_guider_without_a_second_branch_is_refused(case: Any) -> None:
    tiny, pipe = case
    off = {
        "guidance_scale=1.0": diffusers.ClassifierFreeGuidance(1.0),
        "start=0.5": diffusers.ClassifierFreeGuidance(4.0, start=0.5),
        "enabled=False": diffusers.ClassifierFreeGuidance(4.0, enabled=False),
    }
    if isinstance(pipe, getattr(diffusers, "MotifVideoPipeline", ())):
        del off["start=0.5"]  # at which stock itself fails
    for named, pipe.guider in off.items():
        with pytest.raises(ValueError, match=f"pipe.guider=ClassifierFreeGuidance.*{named}.*no second") as error:
            guarded(tiny, pipe, "stp")
        assert "from the first row on" in str(error.value)
        stock = run(tiny, pipe)
        assert torch.equal(guarded(tiny, pipe, "cfg")[0], stock)


def test_stop_ends_the_guard_with_a_warning(case: Any) -> None:
    tiny, pipe = case
    pipe.guider = diffusers.ClassifierFreeGuidance(4.0, stop=0.5)
    with pytest.warns(UserWarning, match="the second branch ended at denoiser row 2"):
        guarded(tiny, pipe, "stp", t_star=0)


def test_other_guiders_are_refused_by_name(case: Any) -> None:
    tiny, pipe = case
    pipe.guider = diffusers.SkipLayerGuidance(4.0, skip_layer_guidance_layers=[0])
    with pytest.raises(ValueError, match=r"pipe.guider=SkipLayerGuidance: a third branch"):
        guarded(tiny, pipe)
    pipe.guider = diffusers.AutoGuidance(4.0, auto_guidance_layers=[0], dropout=0.1)
    with pytest.raises(ValueError, match=r"pipe.guider=AutoGuidance: its second prediction is a weaker model's"):
        guarded(tiny, pipe)
    pipe.guider = None
    with pytest.raises(ValueError, match="has no guider"):
        guarded(tiny, pipe)


def test_a_guarded_guider_does_what_enable_does(case: Any) -> None:
    """The two ways in give the same images: `GuardedGuidance` as pipe.guider, and the guard on the pipeline with CFG."""
    tiny, pipe = case
    policies = [fastguard.policy("stp"), fastguard.policy("og+dtp")]
    expected, report = guarded(tiny, pipe, policies)
    pipe.guider = GuardedGuidance(fastguard.Policy.stack(policies), 4.0)
    assert torch.equal(run(tiny, pipe), expected)
    for ours, theirs in zip(pipe.guider.report, report, strict=True):
        assert ours.d_curve == pytest.approx(theirs.d_curve, rel=1e-6)  # summed in the order of another memory format
        assert ours.transition_step == theirs.transition_step


def test_the_probe_agrees_and_leaves_the_guider_alone(case: Any) -> None:
    tiny, pipe = case
    family = guards.find(type(pipe))
    for original in (False, True):
        pipe.guider = diffusers.AdaptiveProjectedGuidance(
            4.0, adaptive_projected_guidance_momentum=-0.5, use_original_formulation=original
        )
        run(tiny, pipe)
        before = dict(vars(pipe.guider))
        found = probe(pipe, arguments(tiny), family)
        assert found.contradictions() == [] and len(found.rows) == STEPS
        assert vars(pipe.guider) == before
    wrong = dataclasses.replace(family, order=family.order[::-1])
    assert probe(pipe, arguments(tiny), wrong).contradictions()


def test_of_two_guiders_the_one_at_work_has_the_scale() -> None:
    case = CASES["hunyuan-image"]
    pipe = case.make()
    pipe.guider, pipe.ocr_guider = diffusers.ClassifierFreeGuidance(4.0), diffusers.ClassifierFreeGuidance(2.0)
    blank = {f"{prefix}prompt_embeds_2": torch.zeros(2, 5, 16) for prefix in ("", "negative_")}
    for scale, changes in ((2.0, {}), (4.0, blank)):
        with fastguard.enable(pipe, "og+stp", before="opposite", t_star=0):
            ours = run(case, pipe, **changes)
        kept, pipe.guider, pipe.ocr_guider = (
            (pipe.guider, pipe.ocr_guider),
            *[diffusers.ClassifierFreeGuidance(-scale)] * 2,
        )
        expected = run(case, pipe, **changes)
        pipe.guider, pipe.ocr_guider = kept
        torch.testing.assert_close(ours / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


def test_a_wrong_order_does_not_pass(case: Any, monkeypatch: Any) -> None:
    tiny, pipe = case
    right, _ = guarded(tiny, pipe, t_star=0)
    family = guards.find(type(pipe))
    monkeypatch.setattr(guards, "find", lambda _: dataclasses.replace(family, order=family.order[::-1]))
    assert not torch.equal(guarded(tiny, pipe, t_star=0)[0], right)
