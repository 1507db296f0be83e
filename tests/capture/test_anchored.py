"""Anchors of one generation after another in the same graph: nothing of the first one's is left in the second."""

from __future__ import annotations

import pytest
import torch

import fastguard
from fastguard.kernels.layout import State
from fastguard.loop.loop import Loop
from fastguard.policies import plan
from tests.capture.calls import call, eager

pytestmark = pytest.mark.usefixtures("recorders")

CALLS = [
    {"prompt": ["a red cat", "two dogs"], "seeds": (1, 2)},
    {"prompt": ["some green frogs", "snow"], "seeds": (7, 8)},
]


def _stale(monkeypatch, what):
    """From its second generation on a loop goes on with `what` of the generation before."""
    load, advance = Loop.load, Loop.advance

    def loaded(self, *args):
        self.loads = getattr(self, "loads", 0) + 1
        again = self.loads > 2  # a loop is loaded when it is made, and for every generation
        if self.loads == 1:
            self.again, self.before = torch.zeros((), dtype=torch.bool), torch.zeros_like(self.anchor)
        self.again.fill_(again)
        self.before.copy_(self.anchor)
        state = self.state.clone()
        load(self, *args)
        if again and what == "rho":
            self.state[:, State.PUSH] = state[:, State.PUSH]

    def advanced(self, *args):
        advance(self, *args)
        if what in ("m", "mu"):
            half = ("m", "mu").index(what)
            self.anchor[half].copy_(torch.where(self.again, self.before[half], self.anchor[half]))

    monkeypatch.setattr(Loop, "load", loaded)
    monkeypatch.setattr(Loop, "advance", advanced)


@pytest.mark.parametrize("mode", ["step", "loop"])
@pytest.mark.parametrize("what", [None, "m", "mu", "rho"])
def test_nothing_of_an_earlier_generation_is_left(sd, what, mode, monkeypatch):
    """Planted: one of the things that an anchored image holds stays as the first generation left it."""
    monkeypatch.setattr(plan, "ETA", 0.03)  # numbers at which rho moves at every row, and never to its bounds
    monkeypatch.setattr(plan, "DRIFT", -1.0)
    expected = [eager(sd, "anchored", **arguments)[0] for arguments in CALLS]
    if what is not None:
        _stale(monkeypatch, what)
    with fastguard.enable(sd, "anchored", capture=mode) as guard:
        first, second = (call(sd, **arguments) for arguments in CALLS)
        assert guard.report.path == f"fused, {mode} graph" and len(guard.graphs()) == 1, guard.report.reason
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1]) == (what is None)
