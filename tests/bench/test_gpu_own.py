"""What the GPU runner times of an own-combination family, on a tiny model on the CPU: the values before the seconds."""

from __future__ import annotations

import pytest
import torch

from bench import gpu_own
from bench.gpu_timing import WrongValues
from tests.families.tiny import wan_transformer

SMALL = {"height": 32, "width": 32, "num_frames": 5}


def test_stock_a_guard_that_leaves_it_alone_and_two_that_do_not() -> None:
    works = gpu_own.ways(wan_transformer(), SMALL, steps=3)
    assert gpu_own.difference(works) == 0
    stock = works["stock"]()
    for name in ("guarded, dtp", "guarded, anchored"):
        guarded = works[name]()
        assert stock.shape == guarded.shape and (stock - guarded).abs().max() > 1e-3
    assert torch.equal(stock, works["stock"]())


def test_the_benchmark_to_its_end_and_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, without a clock: what `python -m bench.gpu` runs at real size."""
    monkeypatch.setattr(gpu_own, "rounds", lambda works, **_: {name: work().shape for name, work in works.items()})
    monkeypatch.setattr(gpu_own, "transformer", lambda *_: wan_transformer())
    (found,) = gpu_own.own_combination(video=SMALL)
    assert found["difference"] == 0 and list(found["times"]) == ["stock", *gpu_own.GUARDS]
    monkeypatch.setattr(gpu_own, "difference", lambda _: 0.03)
    with pytest.raises(WrongValues, match=r"differ from stock.s by 0\.03"):
        next(gpu_own.own_combination(video=SMALL))


def test_it_has_the_published_size() -> None:
    """1,418,996,800 parameters, counted on the meta device."""
    assert sum(p.numel() for p in gpu_own.transformer("meta").parameters()) == 1_418_996_800
