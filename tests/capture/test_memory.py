"""The memory of graphs: how many there may be, how large, and what a lack of memory costs, in the simulator."""

from __future__ import annotations

import pytest
import torch

from fastguard.capture.graphs import Graphs
from tests.capture.leases import lease, run

pytestmark = pytest.mark.usefixtures("recorders")


@pytest.mark.parametrize("ended", [True, False], ids=["", "and the capture cannot be ended"])
@pytest.mark.parametrize("where", ["warm-up", "capture"])
def test_a_lack_of_memory_counts_for_one_graph_alone(where, ended, recorders, monkeypatch):
    graphs, runs = Graphs(), []
    w = lease(graphs)
    x = w.x
    assert run(graphs, w, "small", lambda: x.add_(1)) is None

    def body():  # run, warm-up, capture
        runs.append(1)
        x.add_(1)
        if len(runs) == (2 if where == "warm-up" else 3):
            try:
                raise torch.OutOfMemoryError("no room")
            finally:
                if not ended:
                    raise RuntimeError("failed due to a previous error during capture")

    x.zero_()
    reason = run(graphs, w, "large", body)
    assert "could not be recorded: OutOfMemoryError: no room" in reason
    assert x.tolist() == [1] * 4, "what ran before it counts"
    attempts = len(runs)
    assert run(graphs, w, "large", body) == reason and len(runs) == attempts + 1, "not tried again"
    assert graphs.failure is None and run(graphs, w, "small", lambda: None) is None
    assert x.tolist() == [3] * 4
    graphs.give_back()
    graphs.clear()
    w = lease(graphs)
    assert run(graphs, w, "large", lambda: w.x.add_(1)) is None


def test_a_pool_in_which_a_first_capture_failed_is_not_taken_again(recorders):
    graphs, runs = Graphs(), []
    w = lease(graphs)
    pools = []
    recorders[0].new_pool = lambda: pools.append(1)

    def body():
        runs.append(1)
        if len(runs) == 3:
            raise torch.OutOfMemoryError("no room")

    assert "no room" in run(graphs, w, "k", body) and pools == [1]


def test_count_and_bytes_are_bounded(recorders):
    graphs = Graphs(limit=3, budget=10_000)
    for size in range(1, 30):
        w = lease(graphs, size, size)
        x = w.x
        assert run(graphs, w, "k", lambda x=x: x.add_(x * 2)) is None
        graphs.give_back()
        assert len(graphs()) <= 3
    assert [len(t.made) for t in recorders[0].tapes] == [1, 1, 1]
    assert graphs.bytes == 8 * (27 + 28 + 29), "tensors of evicted graphs go, too"

    graphs.budget = 1000
    for size in (50, 60, 70, 80):  # 8 bytes an element: workspace and product
        w = lease(graphs, size, size)
        x = w.x
        assert run(graphs, w, "k", lambda x=x: x.add_(x * 2)) is None
        graphs.give_back()
        assert graphs.bytes <= 1000
    kept, recorded = graphs(), recorders[0].recorded
    for size, needed, left in ((500, "2,000", kept), (200, "1,600", [])):
        w = lease(graphs, size, size)
        reason = run(graphs, w, "k", lambda x=w.x: x.add_(x * 2))
        assert f"would need {needed} bytes or more, guard.graphs.budget is 1,000" in reason
        assert run(graphs, w, "k", lambda: None) == reason, "not tried again"
        assert graphs.failure is None and graphs() == left, "what cannot help is not given up"
        graphs.give_back()
    assert recorders[0].recorded == recorded + 1, "what does not fit without its graph is not recorded to be measured"
    assert graphs.bytes == 0


def test_bounds_that_are_lowered_hold_after_the_next_call():
    for lower in ({"limit": 1}, {"budget": 900}):
        graphs = Graphs(limit=3, budget=10_000)
        for size in (20, 40, 60):  # 8 bytes an element
            w = lease(graphs, size, size)
            assert run(graphs, w, "k", lambda x=w.x: x.add_(x * 2)) is None
            graphs.give_back()
        vars(graphs).update(lower)
        w = lease(graphs, 60, 60)
        assert run(graphs, w, "k", lambda: None) is None, "the last one was used last"
        graphs.give_back()
        assert len(graphs()) <= graphs.limit and graphs.bytes <= graphs.budget and graphs()


def test_room_is_made_before_a_graph_is_recorded():
    graphs, seen = Graphs(budget=1000), []
    for size, nbytes in ((50, 0), (80, 300)):  # 8 bytes an element: 400, then 640, and 300 of inputs
        w = lease(graphs, size, size)

        def body(x=w.x):
            seen.append(len(graphs()))
            x.add_(x * 2)

        assert run(graphs, w, "k", body, torch.zeros(nbytes // 4)) is None
        graphs.give_back()
    assert seen == [0, 0, 0, 1, 0, 0] and graphs.bytes == 940, (
        "an eager run, warm-up and recording of each: the first was gone before the second's warm-up began"
    )


def test_least_recently_used_goes_first():
    graphs = Graphs(limit=2)
    w = lease(graphs)
    for key in "abac":
        run(graphs, w, key, lambda: w.x.add_(1))
    replays = [info.replays for info in graphs()]
    assert replays == [2, 1], "b went, a had been used since"
