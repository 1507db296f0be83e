"""One batch of four images under four policies, scales and seeds is four calls of one image: one class of each kind."""

from __future__ import annotations

import pytest
import torch

import fastguard
from tests import pipelines
from tests.families import tiny_guiders
from tests.families.every import EVERY
from tests.families.tiny import run

POLICIES = [
    fastguard.policy("stp", t_star=0, guidance_scale=2.0),
    fastguard.policy("og+dtp", min_step=1, guidance_scale=3.0),
    fastguard.policy("anchored", guidance_scale=5.0),
    fastguard.policy("cfg", guidance_scale=7.5),
]
SEEDS = (11, 12, 13, 14)


def _tokens(name):
    """Arguments for the images `which` of four, of an instance whose embeddings are passed."""
    tiny = EVERY[name]
    four = {}
    for prefix, seeds in (("", (1, 3)), ("negative_", (2, 4))):
        for key in tiny.branch(1):
            four[prefix + key] = torch.cat([tiny.branch(seed)[key] for seed in seeds])

    def arguments(which):
        return {**tiny.fixed, **{key: value[which] for key, value in four.items()}, **tiny.on}

    return tiny.make(), lambda pipe, which, **given: run(
        tiny, pipe, {**arguments(which), **given}, num_inference_steps=8
    )


def _prompts():
    prompts, negatives = ["a cat", "a red dog", "b", "two cats"], ["", "bad", "worse, worst", "no"]

    def call(pipe, which, **given):
        chosen = {"prompt": [prompts[i] for i in which], "negative_prompt": [negatives[i] for i in which]}
        return pipe(**chosen, **given, num_inference_steps=8, guidance_scale=4.0, output_type="latent").images

    return pipelines.sd(), call


def _guider():
    import diffusers

    case = tiny_guiders.CASES["hunyuan-video 1.5"]
    four = {}
    for prefix, seeds in (("", (1, 3)), ("negative_", (2, 4))):
        several = [tiny_guiders.branch(case, seed, prefix) for seed in seeds]
        four |= {key: torch.cat([one[key] for one in several]) for key in several[0]}
    pipe = case.make()
    pipe.guider = diffusers.ClassifierFreeGuidance(4.0)

    def call(pipe, which, **given):
        chosen = {key: value[which] for key, value in four.items()}
        return pipe(**{**tiny_guiders.arguments(case), **chosen, **given, "num_inference_steps": 8})[0]

    return pipe, call


CLASSES = {
    "fused": _prompts,
    "two calls": lambda: _tokens("flux"),
    "two calls, two networks": lambda: _tokens("wan 2.2"),
    "one batch": lambda: _tokens("sana"),
    "one batch, five-argument step": lambda: _tokens("cogvideox, dpm"),
    "guider": _guider,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_mixed_batch_is_four_calls(kind):
    pipe, call = CLASSES[kind]()

    def made(which, policy):
        with fastguard.enable(pipe, policy) as guard:
            generators = [torch.Generator().manual_seed(SEEDS[i]) for i in which]
            return call(pipe, which, generator=generators), guard.report

    batch, report = made([0, 1, 2, 3], POLICIES)
    scale = batch.abs().max().item()
    for i, policy in enumerate(POLICIES):
        single, alone = made([i], policy)
        # A batch's matrix products differ from one image's in their last bits.
        torch.testing.assert_close(batch[i] / scale, single[0] / scale, rtol=0, atol=1e-5)
        ours, theirs = report[i], alone[0]
        assert (ours.transition_step, ours.minimum_step) == (theirs.transition_step, theirs.minimum_step)
        known = [(a, b) for a, b in zip(ours.d_curve, theirs.d_curve, strict=True) if b is not None]
        assert [a for a, _ in known] == pytest.approx([b for _, b in known], rel=1e-3)
    plain, _ = made([0, 1, 2, 3], [fastguard.policy("cfg", guidance_scale=p.guidance_scale) for p in POLICIES])
    changed = [(batch[i] - plain[i]).abs().max().item() / scale for i in range(4)]
    assert min(changed[:3]) > 5e-4 and changed[3] == 0
