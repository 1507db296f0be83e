"""Models that predict a variance besides: the schedulers that use it get the prompt's, whatever the guidance."""

from __future__ import annotations

import pytest
import torch

import fastguard
from tests.families.every import EVERY
from tests.families.older_deepfloyd import deepfloyd
from tests.families.tiny import run


@pytest.fixture(scope="module")
def case():
    return EVERY["deepfloyd text"], deepfloyd("IFPipeline", "learned_range")()


def _guarded(tiny, pipe, policy):
    with fastguard.enable(pipe, policy):
        return run(tiny, pipe, tiny.guided())


def _held(before):
    return fastguard.policy("stp", t_star=0, before=before)


def test_unguarded_images_keep_stocks_bits(case):
    tiny, pipe = case
    assert torch.equal(_guarded(tiny, pipe, "cfg"), run(tiny, pipe, tiny.guided()))


def test_conditional_is_stock_without_guidance(case):
    tiny, pipe = case
    torch.testing.assert_close(_guarded(tiny, pipe, _held("conditional")), run(tiny, pipe, tiny.alone(1)))


def test_zero_has_the_negative_branchs_mean_and_the_prompts_variance(case):
    """No call of stock does that: here u stands in the place of c in the mean's channels alone."""
    tiny, pipe = case

    def mean(module, given, output):
        u, c = output[0].chunk(2)
        return (torch.cat([u, torch.cat([u[:, :3], c[:, 3:]], 1)]),)

    hook = pipe.unet.register_forward_hook(mean)
    expected = run(tiny, pipe, tiny.guided())
    hook.remove()
    ours = _guarded(tiny, pipe, _held("zero"))
    torch.testing.assert_close(ours, expected)
    assert (ours - run(tiny, pipe, tiny.alone(2))).abs().max() > 1e-4  # whose variance is the negative prompt's
