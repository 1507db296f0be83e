"""Whole generations on the embedded model, text encoder to latents: stock, fastguard, the authors' loop mended, torch.compile.

    python -m pytest bench/test_pipeline.py --benchmark-only

Ratios by turns, as the machine may be busy: seconds of one after the other would be worth little. The authors' loop makes one image at a
time and runs a whole pass before it (`bench.methods.reference`). Compilation is not timed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

import fastguard
from bench.methods import Compiled, Dynamic, Generated, Method, Opposite, Preset, Static, Stock
from bench.pairs import alternating
from fastguard import testbed

SIZES = [(1, 8), (8, 8), (2, 16)]  # batch, side of the latents; the model is of 8
STEPS = 10
PAIRS = 8
COMPILE = pytest.param("compile", marks=pytest.mark.skipif(not shutil.which("cc"), reason="no compiler"))
PEERS = ["cfg", "dtp", "stp", "reference-og+dtp", COMPILE]


def call(method: Method, pipe, batch: int) -> Generated:
    prompts = [prompt.prompt for prompt in testbed.prompts("ordinary")[:batch]]
    generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
    return method(pipe, prompts, generators, num_inference_steps=STEPS, guidance_scale=7.5)


def load(side: int):
    pipe = testbed.load()
    pipe.unet.register_to_config(sample_size=side)  # the default of stock and of every method
    return pipe


def stock(batch: int, side: int) -> Callable[[], object]:
    pipe = load(side)
    return lambda: call(Stock(), pipe, batch)


def peer(name: str, batch: int, side: int) -> Callable[[], object]:
    """What to time, after it was seen to compute what another implementation computes."""
    pipe = load(side)
    method: Method
    if name == "compile":
        method = Compiled()
        same(call(method, pipe, batch).latents, call(Stock(), pipe, batch).latents)
    elif name == "reference-og+dtp":
        method = Opposite()
        same_until_transition(call(method, pipe, batch), call(Preset("paper-og+dtp"), pipe, batch))
    else:
        ours = call(Preset(name), pipe, batch)
        if name == "cfg":
            same(ours.latents, call(Stock(), pipe, batch).latents)
        elif name == "stp":
            same(ours.latents, call(Static(500, 0.0), pipe, batch).latents)
        else:
            same_until_transition(ours, call(Dynamic(0.0), pipe, batch))
        fastguard.enable(pipe, name)  # once, as a user would
        method = Stock()
    return lambda: call(method, pipe, batch)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """1e-4 of the largest value, as the project promises against stock in float32."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


def same_until_transition(a: Generated, b: Generated) -> None:
    """Both curves of d, image by image, as far as neither has left the guidance that comes before its transition."""
    for one, other in zip(a.details, b.details, strict=True):
        steps = [d["transition_step"] for d in (one, other) if d["transition_step"] is not None]
        until = min(steps, default=STEPS - 1) + 1
        torch.testing.assert_close(
            torch.tensor(one["d_curve"][:until]), torch.tensor(other["d_curve"][:until]), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("batch,side", SIZES)
@pytest.mark.parametrize("name", PEERS)
def test_ratio(benchmark, capsys, name, batch, side):
    benchmark.group = f"pairs, {STEPS} steps, batch {batch}, latents {side} x {side}"
    ratios = benchmark.pedantic(alternating, (peer(name, batch, side), stock(batch, side)), {"pairs": PAIRS}, rounds=1)
    benchmark.extra_info.update(pair=f"{name} / stock, batch {batch}, latents {side} x {side}", ratios=ratios.values)
    with capsys.disabled():
        print(f"\n{name} / stock, batch {batch}, latents {side} x {side}, {torch.get_num_threads()} threads: {ratios}")
