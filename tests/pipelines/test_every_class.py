"""Every class of the fused kind: stock's numbers under policy `cfg`, zero guidance as stock on the negative prompt."""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import pytest
import torch

import fastguard
from fastguard.pipelines.families import FAMILIES, find
from fastguard.pipelines.probe import probe
from tests import pipelines
from tests.guarded import mask, picture

NAMES = [name for family in FAMILIES for name in family.pipelines if "PixArt" not in name]
# What other tests of the core run, too, is of the slow tier here.
PARAMS = [name if "Union" in name else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
PROMPTS, NEGATIVES = ["a red cat", "two dogs"], ["blurry", "bad, worse"]


def made(name):
    if "PixArt" in name:
        return pipelines.pixart(kind=name)
    make = pipelines.sd3 if "Diffusion3" in name else pipelines.sdxl if "XL" in name else pipelines.sd
    return make(name) if "Diffusion3" in name else make(name, pipelines.ddim())


def pictures(name):
    """Whatever pictures its call takes."""
    taken = inspect.signature(getattr(diffusers, name).__call__).parameters
    union = "Union" in name
    given = {
        "image": [picture(), picture(seed=1)],
        "mask_image": [mask()] * 2,
        "control_image": [picture(seed=2)] if union else [picture(seed=2), picture(seed=3)],
        "control_mode": [1],
        "strength": 0.8,
        "height": 32,
        "width": 32,
    }
    return {key: value for key, value in given.items() if key in taken}


@pytest.mark.parametrize("name", PARAMS)
def test_same_numbers_and_zero_guidance(name):
    pipe, given = made(name), pictures(name)

    def run(prompts, scale, **negative):
        generators = pipelines.generators([1, 2])
        settings = {"num_inference_steps": 4, "guidance_scale": scale, "generator": generators, "output_type": "latent"}
        return pipe(prompts, **negative, **given, **settings).images

    def relative(ours, stock):
        return float((ours - stock).abs().max() / stock.abs().max())

    stock = run(PROMPTS, 4.0, negative_prompt=NEGATIVES)
    negative = run(NEGATIVES, 1.0)
    assert relative(negative, stock) > 1e-3
    with fastguard.enable(pipe, "cfg") as guard:
        assert relative(run(PROMPTS, 4.0, negative_prompt=NEGATIVES), stock) < 1e-4
        assert guard.report.path == "fused", guard.report.reason
    with fastguard.enable(pipe, "stp", t_star=0):
        assert relative(run(PROMPTS, 4.0, negative_prompt=NEGATIVES), negative) < 1e-4
    assert torch.equal(run(PROMPTS, 4.0, negative_prompt=NEGATIVES), stock)


SLOW = "StableDiffusionXLControlNetUnionInpaintPipeline"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == SLOW else name
        for family in FAMILIES
        for name in family.pipelines
    ],
)
def test_declaration_is_what_the_probe_finds(name):
    """One batch [u, c], e = u + s (c - u): what the fused kind takes for granted of each of its classes."""
    pipe, given = made(name), pictures(name)
    if "PixArt" in name:
        given = {**pipelines.pixart_embeds(2), "negative_prompt": None, "height": 64, "width": 64}
        given["use_resolution_binning"] = False
    else:
        given |= {"prompt": PROMPTS, "negative_prompt": NEGATIVES}
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": pipelines.generators([1, 2])}
    with fastguard.enable(pipe, "cfg") as guard:
        found = guard.probe(**given, **settings)
    rows = len(found.rows)
    assert found.contradictions() == [] and rows >= 3
    assert [row.cond for row in found.rows] == pytest.approx([4.0] * rows) and all(row.linear for row in found.rows)
    family = find(type(pipe))
    for wrong in ({"order": family.order[::-1]}, {"sign": -1}, {"offset": 1.0}):
        planted = dataclasses.replace(family, **wrong)
        assert len(probe(pipe, {**given, **settings}, planted).contradictions()) == rows
