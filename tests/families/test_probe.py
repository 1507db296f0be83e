"""The probe finds what each family declares, tells what is declared wrongly, and leaves no trace."""

from __future__ import annotations

import dataclasses
import functools

import accelerate
import diffusers
import pytest
import torch
from diffusers import hooks

import fastguard
from fastguard.pipelines.families import Family, find
from fastguard.pipelines.probe import infer, probe
from tests.families.every import EVERY, PARAMS
from tests.families.tiny import euler, flux_transformer, parts, run


@functools.lru_cache(maxsize=1)
def _pipe(name):
    return EVERY[name].make()


@pytest.fixture(params=PARAMS, scope="module")
def case(request):
    return EVERY[request.param], _pipe(request.param)


def _arguments(tiny, **changes):
    return {**tiny.guided(num_inference_steps=tiny.steps), **changes}


def test_declaration_is_what_the_probe_finds(case):
    tiny, pipe = case
    found = probe(pipe, _arguments(tiny), find(type(pipe)))
    assert found.contradictions() == []
    assert len(found.rows) == tiny.steps
    assert all(row.linear for row in found.rows) == (not tiny.bends)


@pytest.mark.parametrize("fault", ["order", "sign", "offset", "tokens"])
def test_a_wrong_declaration_is_told(case, fault):
    tiny, pipe = case
    if fault not in tiny.told:
        pytest.skip("its combination hides that")
    family = find(type(pipe))
    wrong = {
        "order": dataclasses.replace(family, order=family.order[::-1]),
        "sign": dataclasses.replace(family, sign=-family.sign),
        "offset": dataclasses.replace(family, offset=family.offset + 1.5),
        "tokens": dataclasses.replace(
            family, to_step=lambda pipe, output, given: output.flip(-1).reshape(output.shape)
        ),
    }[fault]
    assert probe(pipe, _arguments(tiny), wrong).contradictions()


def test_no_second_branch_is_told(case):
    tiny, pipe = case
    (told,) = probe(pipe, {**tiny.alone(1), "num_inference_steps": 2}, find(type(pipe))).contradictions()
    assert "second branch" in told


def test_a_linear_family_is_inferred():
    for name in ("flux", "wan", "sana", "hidream", "krea 2"):
        if name not in EVERY:
            continue
        tiny, pipe = EVERY[name], EVERY[name].make()
        declared, found = find(type(pipe)), infer(pipe, _arguments(tiny)).family
        same = ("calls", "order", "sign", "scale", "offset")
        assert [getattr(found, one) for one in same] == [getattr(declared, one) for one in same]


def test_a_family_that_is_not_linear_is_not_inferred():
    tiny, pipe = EVERY["qwen"], EVERY["qwen"].make()
    with pytest.raises(TypeError, match="residual"):
        infer(pipe, _arguments(tiny))


def test_scales_of_rows_are_found():
    """Wan 2.2's boundary: the second transformer has a scale of its own."""
    tiny, pipe = EVERY["wan 2.2"], EVERY["wan 2.2"].make()
    found = probe(pipe, _arguments(tiny, num_inference_steps=8), find(type(pipe)))
    assert [round(row.cond, 3) for row in found.rows] == [4.0] * 3 + [3.0] * 5


def test_scales_of_frames_are_told_by_sign():
    """Stable Video Diffusion's default: another scale for each frame."""
    tiny, pipe = EVERY["stable video diffusion"], EVERY["stable video diffusion"].make()
    family, arguments = find(type(pipe)), _arguments(tiny, min_guidance_scale=1.0, max_guidance_scale=3.0)
    found = probe(pipe, arguments, family)
    assert found.contradictions() == [] and not any(row.linear for row in found.rows)
    stock = run(tiny, pipe, arguments)
    with fastguard.enable(pipe, "cfg"):
        assert torch.equal(run(tiny, pipe, arguments), stock)
    for wrong in ({"order": family.order[::-1]}, {"sign": -1}):
        assert len(probe(pipe, arguments, dataclasses.replace(family, **wrong)).contradictions()) == tiny.steps


class Generators(list):
    """A user's own kind of list."""


def test_nothing_is_left_behind(case):
    tiny, pipe = case
    generators = tiny.generators(1, 2)
    generators = Generators(generators) if isinstance(generators, list) else generators

    def callback(*_):
        raise AssertionError("a probe calls no callback")

    each = generators if isinstance(generators, list) else [generators]
    before = [*(one.get_state() for one in each), torch.get_rng_state()]
    attributes, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    denoisers = {name: (part, set(vars(part))) for name in find(type(pipe)).denoisers if (part := getattr(pipe, name))}
    probe(pipe, _arguments(tiny, generator=generators, callback_on_step_end=callback), find(type(pipe)))
    after = [*(one.get_state() for one in each), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert dict(vars(pipe)) == attributes
    assert set(vars(pipe.scheduler)) == set(scheduler)
    assert all(vars(pipe.scheduler)[name] is value for name, value in scheduler.items())
    for part, names in denoisers.values():
        assert set(vars(part)) == names


def test_a_loop_that_steps_another_scheduler_is_told():
    class Other(diffusers.FluxPipeline):
        def __call__(self, **given):
            self.transformer(torch.zeros(1))

    class Denoiser(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x):
            return (x,)

    pipe = parts(Other, scheduler=euler())
    pipe.transformer = Denoiser()
    family = Family(name="other", pipelines=("Other",))
    (told,) = probe(pipe, {}, family).contradictions()
    assert "no scheduler.step" in told


def _offloaded(pipe):
    _, hook = accelerate.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    pipe._all_hooks = [hook]


def _group_offloaded(pipe):
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _cached(pipe):
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1))


@pytest.mark.parametrize("attach", [_offloaded, _group_offloaded, _cached])
def test_offloading_and_caches_are_left_as_they_were(attach):
    tiny = EVERY["flux"]
    pipe = parts(
        diffusers.FluxPipeline,
        transformer=flux_transformer(num_layers=2, num_single_layers=2),
        scheduler=euler(),
    )
    attach(pipe)
    stock = run(tiny, pipe, tiny.guided())
    names = ("forward", "_hf_hook", "_diffusers_hook")
    before = [[vars(module).get(name) for name in names] for module in pipe.transformer.modules()]
    hooks_before = list(getattr(pipe, "_all_hooks", ()))
    found = probe(pipe, _arguments(tiny), find(type(pipe)))
    assert found.contradictions() == [] and len(found.rows) == tiny.steps
    after = [[vars(module).get(name) for name in names] for module in pipe.transformer.modules()]
    assert all(a is b for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True))
    assert all(a is b for a, b in zip(hooks_before, getattr(pipe, "_all_hooks", ()), strict=True))
    assert torch.equal(run(tiny, pipe, tiny.guided()), stock)


def test_a_probe_on_the_users_own_call():
    tiny, pipe = EVERY["wan 2.2"], EVERY["wan 2.2"].make()
    with fastguard.enable(pipe, "cfg") as guard:
        found = guard.probe(**tiny.guided(num_inference_steps=tiny.steps))
        assert guard.report is None and str(found).count("linear, residual") == tiny.steps
    assert str(found).startswith("wan: two calls c, u, guidance_scale: agrees with the loop")
    assert found.to_dict()["contradictions"] == [] and found.to_dict()["rows"][0]["cond"] == pytest.approx(4.0)
