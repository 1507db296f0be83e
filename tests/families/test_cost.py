"""What the guard adds to a stock loop: nothing that waits for the device, and few launches a row."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import fastguard
from tests.families.every import EVERY
from tests.families.tiny import run

MIXED = ["stp", "cfg"]
NAMES = ["flux", "qwen", "wan", "z-image", "hidream", "cogvideox, dpm"]
OP_LAUNCHES = 2  # the fused op, for the largest latents
_VIEWS = {"view", "_unsafe_view", "slice", "select", "unbind", "split", "alias", "detach", "expand", "as_strided", "t"}
_NO_LAUNCH = _VIEWS | {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "transpose",
    "permute",
    "squeeze",
    "unsqueeze",
}


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.rows, self.now = [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in _NO_LAUNCH:
            self.now[name] += OP_LAUNCHES if name == "guided_step" else 1
        return func(*args, **(kwargs or {}))


def _launches(tiny, pipe, policy=None):
    """Of every row, whatever runs between two callbacks."""
    mode = _Launches()

    def callback(pipe, row, timestep, given):
        mode.rows.append(mode.now)
        mode.now = Counter()
        return {}

    arguments = tiny.guided(callback_on_step_end=callback)
    if policy is None:
        with mode:
            run(tiny, pipe, arguments)
    else:
        with fastguard.enable(pipe, policy), mode:
            run(tiny, pipe, arguments)
    return mode.rows


@pytest.mark.parametrize("name", NAMES)
def test_at_most_six_launches_a_row_beside_stock(name):
    """Two to four where nothing is anchored: the op, and what a list or a sign costs; the latents besides, where something is."""
    tiny = EVERY[name]
    pipe = tiny.make()
    stock = _launches(tiny, pipe)
    for policy in (MIXED, "anchored"):
        ours = _launches(tiny, pipe, policy)
        for row in range(1, tiny.steps):  # the first one brings the tables
            added = ours[row] - stock[row]
            assert added["guided_step"] == OP_LAUNCHES
            assert sum(added.values()) <= (4 if policy == MIXED else 5), added


@pytest.mark.parametrize("name", ["flux", "wan", "z-image"])
def test_waits_are_stocks(name):
    tiny = EVERY[name]
    pipe = tiny.make()

    def waits():
        found = fastguard.find_syncs(pipe, **tiny.guided()).ops
        return Counter((op.line, op.code) for op in found if op.blocking)

    stock = waits()
    with fastguard.enable(pipe, MIXED):
        assert waits() == stock
