"""Whole denoising steps on the CPU, the embedded model's UNet and the arithmetic around it: stock's loop against the guided step.

    python -m pytest bench/test_step.py --benchmark-only

As bench/test_guided_step.py, with the denoiser that it leaves out; what is left of its ratios once a real, small UNet runs too.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.pairs import alternating
from bench.test_guided_step import Guided, Stock, same
from fastguard import testbed

SHAPES = [(1, 8, 8, 8), (8, 8, 8, 8), (2, 8, 16, 16)]
PAIRS = 5


@functools.cache
def pipe():
    return testbed.load()


def peers(shape: tuple[int, ...]) -> tuple[Stock, Guided]:
    """Both, after they were seen to compute the same: 1e-4 of the largest value, as the project promises against stock."""
    with torch.no_grad():
        c, u = pipe().encode_prompt(["a red apple"] * shape[0], "cpu", 1, True)
    embeddings = torch.cat([u, c])

    @torch.no_grad()
    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return pipe().unet(x, t, encoder_hidden_states=embeddings, return_dict=False)[0]

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stock, guided = Stock(x, denoise), Guided(x, denoise)
    same(stock, guided, 1e-4)
    return stock, guided


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratio(benchmark, capsys, shape):
    """Alternating pairs, as the machine may be busy."""
    stock, guided = peers(shape)
    ratios = benchmark.pedantic(alternating, (guided, stock), {"pairs": PAIRS}, rounds=1)
    benchmark.extra_info.update(pair=f"steps with the UNet / stock, {shape}", ratios=ratios.values)
    with capsys.disabled():
        print(f"\nguided step / stock at {shape}, {torch.get_num_threads()} threads: {ratios}")
