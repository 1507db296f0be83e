"""What the GPU runner times of an own-combination family, on a tiny model on the CPU: the values before the seconds."""

from __future__ import annotations

import torch

from bench import gpu_own
from tests.families.tiny import wan_transformer

SMALL = {"height": 32, "width": 32, "num_frames": 5}


def test_the_three_ways_are_stock_a_guard_that_leaves_it_alone_and_one_that_does_not() -> None:
    works = gpu_own.ways(wan_transformer(), SMALL, steps=3)
    assert gpu_own.difference(works) == 0
    stock, guarded = works["stock"](), works["guarded, dtp"]()
    assert stock.shape == guarded.shape and (stock - guarded).abs().max() > 1e-3
    assert torch.equal(stock, works["stock"]())
