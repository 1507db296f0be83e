"""What must hold for every pipeline that combines its branches itself: stock's bits, zero and conditional guidance, d, callbacks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect

import pytest
import torch

import fastguard
from fastguard.pipelines import guard as guards
from tests.families.every import EVERY, PARAMS
from tests.families.tiny import negative_alone, run


@functools.lru_cache(maxsize=1)
def _stock(name):
    tiny = EVERY[name]
    pipe = tiny.make()
    return pipe, run(tiny, pipe, tiny.guided())


@pytest.fixture(params=PARAMS, scope="module")
def case(request):
    """(tiny, its pipeline, stock's guided output)"""
    pipe, stock = _stock(request.param)
    return EVERY[request.param], pipe, stock


def _guarded(tiny, pipe, policy):
    with fastguard.enable(pipe, policy) as guard:
        return run(tiny, pipe, tiny.guided()), guard.report


def _held(tiny, **overrides):
    """A policy that holds an image to the end."""
    if tiny.counts_steps:
        return fastguard.policy("stp", t_star=0, **overrides)
    return fastguard.policy("paper-dtp", min_step=100, **overrides)


def _assert_same(ours, expected, exact):
    if exact:
        assert torch.equal(ours, expected)
    else:  # halves of a batch instead of a batch: the last bits of a matrix product
        torch.testing.assert_close(ours / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=2e-6)


def test_unguarded_images_keep_stocks_bits(case):
    tiny, pipe, stock = case
    ours, report = _guarded(tiny, pipe, "cfg")
    assert torch.equal(ours, stock)
    assert report[0].elements == tiny.elements and report[0].denoiser_rows == 2 * tiny.steps


def test_zero_is_stock_on_the_negative_prompt(case):
    tiny, pipe, stock = case
    ours, report = _guarded(tiny, pipe, _held(tiny))
    expected = negative_alone(tiny, pipe)
    assert (expected - stock).abs().max() > 1e-5 * stock.abs().max()
    _assert_same(ours, expected, tiny.exact)
    calls = guards.find(type(pipe)).calls
    skipped = {1: 0, 2: tiny.steps - tiny.full_rows}[calls]
    assert report[0].denoiser_rows == 2 * tiny.steps - skipped


def test_conditional_is_stock_without_guidance(case):
    tiny, pipe, _ = case
    ours, _ = _guarded(tiny, pipe, _held(tiny, before="conditional"))
    # e = u + 1 (c - u) is c but for the last bit
    _assert_same(ours, run(tiny, pipe, tiny.alone(1)), exact=False)


def test_d_is_the_distance_of_the_denoisers_outputs(case):
    tiny, pipe, _ = case
    family = guards.find(type(pipe))
    outputs = []
    names = [name for name in family.denoisers if getattr(pipe, name, None) is not None]
    hooks = [getattr(pipe, name).register_forward_hook(lambda m, i, o: outputs.append(o[0])) for name in names]
    try:
        _, report = _guarded(tiny, pipe, "cfg")
    finally:
        for hook in hooks:
            hook.remove()
    tensors = [torch.stack(list(o)) if isinstance(o, (list, tuple)) else o for o in outputs]
    pairs = zip(tensors[::2], tensors[1::2], strict=True) if family.calls == 2 else (t.chunk(2) for t in tensors)
    for row, (one, other) in enumerate(pairs):
        difference = (one.double() - other.double()).movedim(tiny.along, 1)[:, slice(*tiny.kept)]
        d = difference.flatten(1).pow(2).sum(1)
        ours = torch.tensor([image.d_curve[row] for image in report], dtype=torch.float64)
        torch.testing.assert_close(ours, d, rtol=1e-5, atol=0)


def test_a_mixed_batch_equals_single_policies(case):
    """Images of one batch under different policies and scales get what each gets where all have its policy."""
    tiny, pipe, stock = case
    if tiny.images == 1:
        pytest.skip("it makes one image a call")
    guarded, _ = _guarded(tiny, pipe, _held(tiny, monitor=True))
    ours, _ = _guarded(tiny, pipe, [_held(tiny, monitor=True), "cfg"])
    assert torch.equal(ours[0], guarded[0]) and torch.equal(ours[1], stock[1])
    scaled, _ = _guarded(tiny, pipe, fastguard.policy("cfg", guidance_scale=2.0))
    ours, _ = _guarded(tiny, pipe, ["cfg", fastguard.policy("cfg", guidance_scale=2.0)])
    assert torch.equal(ours[0], stock[0]) and torch.equal(ours[1], scaled[1]) and not torch.equal(ours[1], stock[1])


def test_a_callback_interrupts_and_changes_latents(case):
    tiny, pipe, _ = case

    def callback(pipe, row, timestep, given):
        pipe._interrupt = row == 1
        return {"latents": given["latents"] * 0.5}

    if (
        not hasattr(type(pipe), "interrupt")
        or "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters
    ):
        pytest.skip("its loop looks at no interrupt, or calls nothing back")
    changes = {"callback_on_step_end": callback}
    stock = run(tiny, pipe, tiny.guided(), **changes)
    with fastguard.enable(pipe, "cfg") as guard:
        ours = run(tiny, pipe, tiny.guided(), **changes)
    assert torch.equal(ours, stock) and guard.report[0].denoiser_rows == 4


def test_a_call_without_a_second_branch_is_refused(case):
    tiny, pipe, _ = case
    with fastguard.enable(pipe, _held(tiny)), pytest.raises(ValueError, match="no second") as error:
        run(tiny, pipe, tiny.alone(1))
    assert guards.find(type(pipe)).scale in str(error.value)
    with fastguard.enable(pipe, "cfg"):
        assert torch.equal(run(tiny, pipe, tiny.alone(1)), run(tiny, pipe, tiny.alone(1)))


def test_a_wrong_order_does_not_pass(case, monkeypatch):
    tiny, pipe, _ = case
    family = guards.find(type(pipe))
    wrong = dataclasses.replace(family, order=family.order[::-1])
    monkeypatch.setattr(guards, "find", lambda _: wrong)
    ours, _ = _guarded(tiny, pipe, _held(tiny))
    expected = negative_alone(tiny, pipe)
    assert (ours - expected).abs().max() > 1e-5 * expected.abs().max()


def test_unguarded_images_keep_stocks_bits_in_bfloat16(case):
    """Pipelines combine in the model's dtype or in float32; what the guard lets through has the combination's own."""
    tiny, pipe, _ = case
    copied = _in_bfloat16(tiny, pipe)
    arguments = {name: _narrow(value) for name, value in tiny.guided().items()}
    stock = run(tiny, copied, arguments)
    policies = [_held(tiny, monitor=True), "cfg"][-tiny.images :]
    with fastguard.enable(copied, policies) as guard:
        ours = run(tiny, copied, arguments)
    assert ours.dtype == stock.dtype and torch.equal(ours[-1], stock[-1])
    assert all(d is not None for image in guard.report for d in image.d_curve[: tiny.steps])


def _in_bfloat16(tiny, pipe):
    """A copy as `from_pretrained` makes it: with the layers in float32 that their models keep so."""
    copied = copy.deepcopy(pipe).to(torch.bfloat16)
    for name, part in copied.components.items():
        kept = getattr(part, "_keep_in_fp32_modules", None) or ()
        for path, module in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            if name in tiny.wide or set(kept) & set(path.split(".")):
                module.float()
    return copied


def _narrow(value):
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.bfloat16()
    return [_narrow(one) for one in value] if isinstance(value, list) else value
