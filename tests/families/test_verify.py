"""enable(verify=True), enable(family="probe"), and the line about a loop that has changed."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging

import diffusers
import pytest
import torch

import fastguard
from fastguard.pipelines import guard as guards
from fastguard.pipelines.families import loops
from tests import pipelines
from tests.families.tiny import CASES, parts, run


class Unknown(diffusers.FluxPipeline):
    """A class that nobody declared, with a loop that the probe can read."""

    @functools.wraps(diffusers.FluxPipeline.__call__)
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.fixture(scope="module")
def flux():
    return CASES["flux"].make()


def test_verify_probes_the_first_call(flux, monkeypatch):
    tiny = CASES["flux"]
    stock = run(tiny, flux, tiny.guided())
    with fastguard.enable(flux, "cfg", verify=True) as guard:
        assert torch.equal(run(tiny, flux, tiny.guided()), stock) and guard.probed
    family = guards.find(type(flux))
    monkeypatch.setattr(guards, "find", lambda _: dataclasses.replace(family, order=("uncond", "cond")))
    with fastguard.enable(flux, "cfg", verify=True), pytest.raises(RuntimeError, match="does not know this loop"):
        run(tiny, flux, tiny.guided())


def test_a_denoiser_whose_output_is_a_tuple_of_its_own_kind(monkeypatch):
    class Kind(tuple):
        pass

    tiny, pipe = CASES["flux"], CASES["flux"].make()
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: Kind(forward(*args, **kwargs))
    with fastguard.enable(pipe, "cfg", verify=True) as guard:
        run(tiny, pipe, tiny.guided())
    assert guard.probed


def test_verify_takes_the_fused_kind(monkeypatch):
    pipe = pipelines.sd()
    with fastguard.enable(pipe, "cfg", verify=True) as guard:
        pipe("a cat", num_inference_steps=2, guidance_scale=4.0, output_type="latent")
    assert guard.probed


def test_an_unknown_class_is_taken_at_the_users_word(flux):
    tiny = CASES["flux"]
    pipe = parts(Unknown, transformer=flux.transformer, scheduler=flux.scheduler)
    with pytest.raises(TypeError, match=r"Unknown is not supported.*family='probe'"):
        fastguard.enable(pipe, "cfg")
    stock, zero = run(tiny, flux, tiny.guided()), run(tiny, flux, tiny.alone(2))
    with fastguard.enable(pipe, "cfg", family="probe") as guard:
        arguments = tiny.guided()
        assert str(guard.probe(**arguments, num_inference_steps=2)).startswith("probe: two calls c, u, true_cfg_scale")
        assert torch.equal(run(tiny, pipe, arguments), stock)
        assert guard.family.calls == 2 and guard.family.order == ("cond", "uncond")
    with fastguard.enable(pipe, "stp", t_star=0, family="probe"):
        assert torch.equal(run(tiny, pipe, arguments), zero)


def test_an_unknown_class_that_is_not_linear_is_refused():
    class Bent(diffusers.QwenImagePipeline):
        @functools.wraps(diffusers.QwenImagePipeline.__call__)
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    tiny, qwen = CASES["qwen"], CASES["qwen"].make()
    pipe = parts(Bent, transformer=qwen.transformer, scheduler=qwen.scheduler)
    with fastguard.enable(pipe, "cfg", family="probe"), pytest.raises(TypeError, match="residual"):
        run(tiny, pipe, tiny.guided())


def test_a_changed_loop_is_told_of(flux, monkeypatch, caplog):
    monkeypatch.setattr(loops, "fingerprint", lambda _: "another")
    with caplog.at_level(logging.WARNING, "fastguard"), fastguard.enable(flux, "cfg"):
        pass
    assert "FluxPipeline: its loop is not the one of diffusers" in caplog.text
    known = json.loads(loops._FILE.read_text())["loops"][
        "FluxPipeline"
    ]  # not the installed one's with another diffusers
    monkeypatch.setattr(loops, "fingerprint", lambda _: known)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastguard"), fastguard.enable(flux, "cfg"):
        pass
    assert not caplog.text
