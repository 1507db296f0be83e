"""Pipelines whose guidance is a guider's: what must hold for every family, with the guiders that people put there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fastguard
from fastguard.fronts.guider import GuardedGuidance
from fastguard.pipelines import guard as guards
from fastguard.pipelines.probe import probe
from tests.families.tiny_guiders import CASES, STEPS, Case, arguments, branch

GUIDERS = {
    "CFG": lambda: diffusers.ClassifierFreeGuidance(4.0),
    "APG": lambda: diffusers.AdaptiveProjectedGuidance(4.0, adaptive_projected_guidance_momentum=-0.5),
}
MORE = {
    "CFG, rescaled": lambda: diffusers.ClassifierFreeGuidance(4.0, guidance_rescale=0.7),
    "APG mix": lambda: diffusers.AdaptiveProjectedMixGuidance(4.0),
    "zero*": lambda: diffusers.ClassifierFreeZeroStarGuidance(4.0),
    "tangential": lambda: diffusers.TangentialClassifierFreeGuidance(4.0),
}


def run(case: Case, pipe: Any, **changes: Any) -> torch.Tensor:
    return pipe(**{**arguments(case), **changes})[0]


def guarded(case: Case, pipe: Any, policy: Any = "stp", **overrides: Any) -> tuple[torch.Tensor, Any]:
    with fastguard.enable(pipe, policy, **overrides) as guard:
        return run(case, pipe), guard.report


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {}


_LATER = ("hunyuan-video 1.5, image", "hunyuan-image refiner", "motif, image")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in _LATER else name for name in CASES])
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
    _assert_bits(tiny, pipe)


@pytest.mark.parametrize("guider", MORE)
def test_unguarded_images_keep_the_bits_of_other_guiders(guider: str) -> None:
    tiny = CASES["hunyuan-image refiner"]
    pipe = tiny.make()
    pipe.guider = MORE[guider]()
    _assert_bits(tiny, pipe)


def _assert_bits(tiny: Case, pipe: Any) -> None:
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
    if type(pipe).__name__.startswith("MotifVideo"):
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
    with pytest.warns(UserWarning, match="the second branch ended at denoiser row 2") as told:
        guarded(tiny, pipe, "stp", t_star=0)
    assert "tests/families" in Path(told[-1].filename).as_posix(), "a warning points at the user's line"


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


def test_an_anchored_guider_does_what_enable_does(case: Any) -> None:
    """It sees the latents in what the model is shown, before a picture's channels."""
    tiny, pipe = case
    policies = [fastguard.policy("anchored"), fastguard.policy("anchored", gate=1e3)]
    expected, report = guarded(tiny, pipe, policies)
    stock = run(tiny, pipe)
    assert torch.equal(expected[1], stock[1]) and not torch.equal(expected[0], stock[0])
    pipe.guider = GuardedGuidance(fastguard.Policy.stack(policies), 4.0)
    pipe.guider.scheduler = pipe.scheduler
    ours = run(tiny, pipe)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert pipe.guider.report[0].share_curve == pytest.approx(report[0].share_curve, rel=1e-3, abs=1e-4)


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
