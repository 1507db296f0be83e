"""Recording and replaying bodies, in the simulator. Faults that a CUDA graph would hide are planted and must show."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastguard.capture import program
from fastguard.capture.graphs import Graphs
from fastguard.capture.program import Program
from tests.capture import simulator

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def recorders():
    with simulator.recording() as made:
        yield made


def content(size=4):
    x = torch.zeros(size)
    return SimpleNamespace(x=x, tensors=[x], nbytes=x.nbytes)


def lease(graphs, key="shape", size=4):
    return graphs.lease(key, CPU, lambda: content(size))


def run(graphs, workspace, key, body, **kwargs):
    return graphs.run(workspace, key, graphs.program(workspace, key, lambda: Program(body, **kwargs)))


def test_a_replay_reads_new_contents_in_the_same_places():
    graphs, weight = Graphs(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    w = lease(graphs)
    x = w.content.x

    def body():
        x.add_(weight * 2)

    for _ in range(3):
        assert run(graphs, w, "add", body, keeps=[x]) is None
    assert torch.equal(x, weight * 6), "neither warm-up nor recording may leave a trace"
    weight.mul_(10)  # in place: a graph sees it
    x.zero_()
    run(graphs, w, "add", body, keeps=[x])
    assert x.tolist() == [20, 40, 60, 80]
    (info,) = graphs()
    assert info.replays == 4 and info.bytes == 16 and info.seconds > 0


def faulty(kind, x):
    """Bodies that look right and go stale."""
    state = {"step": 0, "scale": 2.0, "fresh": torch.ones(4)}

    def counter():
        state["step"] += 1
        x.add_(state["step"])

    def scale():
        x.add_(torch.ones(4) * state["scale"])

    def fresh():
        x.add_(state["fresh"])

    def between():
        state["scale"] += 1
        state["fresh"] = torch.full((4,), state["scale"])

    return {"counter": counter, "scale": scale, "fresh": fresh}[kind], between


@pytest.mark.parametrize("kind", ["counter", "scale", "fresh"])
def test_python_counters_baked_scales_and_fresh_tensors_show_as_wrong_values(kind):
    """The simulator catches what it is there to catch."""
    results = []
    for recorded in (False, True):
        graphs = Graphs()
        w = lease(graphs)
        body, between = faulty(kind, w.content.x)
        for _ in range(4):
            run(graphs, w, "k", body, keeps=[w.content.x]) if recorded else body()
            between()
        results.append(w.content.x.clone())
    assert not torch.equal(*results)


def test_what_a_body_leaves_in_the_pool_is_worthless():
    graphs, kept = Graphs(), []
    w = lease(graphs)
    run(graphs, w, "k", lambda: kept.append(w.content.x * 2), keeps=[])
    assert all(t.isnan().all() for t in kept[-1:])


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.add_(x.sum().item()),
        lambda x: x.add_(x[x > 0].sum()),
        lambda x: x.add_(torch.rand(4)),
        lambda x: x.add_(torch.tensor([1.0, 2.0, 3.0, 4.0])),
        lambda x: x.add_(float(torch.equal(x, x))),
    ],
    ids=["item", "mask", "random", "host-copy", "equal"],
)
def test_what_no_capture_allows_falls_back_for_good(forbidden):
    graphs = Graphs()
    w = lease(graphs)
    torch.manual_seed(0)
    reason = run(graphs, w, "k", lambda: forbidden(w.content.x), keeps=[w.content.x])
    assert "capture failed" in reason and "not permitted" in reason
    assert graphs() == [] and not w.content.x.isnan().any(), "the body ran eagerly instead"
    before = w.content.x.clone()
    assert run(graphs, w, "other", lambda: w.content.x.add_(1), keeps=[]) == reason
    assert torch.equal(w.content.x, before + 1)
    graphs.give_back(w)
    graphs.clear()
    assert graphs.failure is None
    w = lease(graphs)
    assert run(graphs, w, "other", lambda: w.content.x.add_(1), keeps=[w.content.x]) is None


def test_an_error_of_the_body_is_the_callers_and_leaves_the_graphs_alone():
    """Arguments of a wrong shape, say."""
    graphs, weight = Graphs(), torch.ones(4)
    w = lease(graphs)
    x = w.content.x
    assert run(graphs, w, "good", lambda: x.add_(weight), keeps=[x]) is None
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(graphs, w, "bad", lambda: x.add_(torch.ones(3)), keeps=[x])
    assert graphs.failure is None and len(graphs()) == 1
    assert run(graphs, w, "good", lambda: None) is None and x.tolist() == [2] * 4


@pytest.mark.parametrize("ended", [True, False], ids=["", "and the capture cannot be ended"])
@pytest.mark.parametrize("where", ["warm-up", "capture"])
def test_a_lack_of_memory_counts_for_one_graph_alone(where, ended, recorders, monkeypatch):
    graphs, runs = Graphs(), []
    w = lease(graphs)
    x = w.content.x
    assert run(graphs, w, "small", lambda: x.add_(1), keeps=[x]) is None

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
    reason = run(graphs, w, "large", body, keeps=[x])
    assert "could not be recorded: OutOfMemoryError: no room" in reason
    assert x.tolist() == [1] * 4, "what ran before it counts"
    attempts = len(runs)
    assert run(graphs, w, "large", body, keeps=[x]) == reason and len(runs) == attempts + 1, "not tried again"
    assert graphs.failure is None and run(graphs, w, "small", lambda: None) is None
    assert x.tolist() == [3] * 4
    graphs.give_back(w)
    graphs.clear()
    w = lease(graphs)
    assert run(graphs, w, "large", lambda: w.content.x.add_(1), keeps=[w.content.x]) is None


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


@pytest.mark.parametrize("when", ["by its first run", "by what came of it"])
def test_what_changes_outside_its_tensors_runs_once_and_eagerly(when, recorders):
    """Whoever watches is asked after the first run, before anything is recorded, and again when it was."""
    graphs, looked, runs = Graphs(), [], []
    w = lease(graphs)
    x = w.content.x

    def watch():
        def changed():
            looked.append(len(runs))
            return "it changed" if len(looked) == (1 if when == "by its first run" else 2) else None

        return changed

    def body():
        runs.append(1)
        x.add_(1)

    assert run(graphs, w, "k", body, keeps=[x], watch=watch) == "it changed"
    assert x.tolist() == [1] * 4 and graphs() == [] and recorders[0].tapes == []
    assert looked == ([1] if when == "by its first run" else [1, 3]) and len(runs) == looked[-1]
    assert run(graphs, w, "k", body, keeps=[x], watch=watch) is None and x.tolist() == [2] * 4


def test_count_and_bytes_are_bounded(recorders):
    graphs = Graphs(limit=3, budget=10_000)
    for size in range(1, 30):
        w = lease(graphs, size, size)
        x = w.content.x
        assert run(graphs, w, "k", lambda x=x: x.add_(x * 2), keeps=[x]) is None
        graphs.give_back(w)
        assert len(graphs()) <= 3
    assert [len(t.made) for t in recorders[0].tapes] == [1, 1, 1]
    assert len(graphs._workspaces) == 3, "tensors of evicted graphs go, too"

    graphs.budget = 1000
    for size in (50, 60, 70, 80):  # 8 bytes an element: workspace and product
        w = lease(graphs, size, size)
        x = w.content.x
        assert run(graphs, w, "k", lambda x=x: x.add_(x * 2), keeps=[x]) is None
        graphs.give_back(w)
        assert graphs.bytes <= 1000
    kept, recorded = graphs(), recorders[0].recorded
    for size, needed, left in ((500, "2,000", kept), (200, "1,600", [])):
        w = lease(graphs, size, size)
        reason = run(graphs, w, "k", lambda x=w.content.x: x.add_(x * 2), keeps=[w.content.x])
        assert f"would need {needed} bytes or more, guard.graphs.budget is 1,000" in reason
        assert run(graphs, w, "k", lambda: None) == reason, "not tried again"
        assert graphs.failure is None and graphs() == left, "what cannot help is not given up"
        graphs.give_back(w)
    assert recorders[0].recorded == recorded + 1, "what does not fit without its graph is not recorded to be measured"
    assert graphs._workspaces == {}


def test_bounds_that_are_lowered_hold_after_the_next_call():
    for lower in ({"limit": 1}, {"budget": 900}):
        graphs = Graphs(limit=3, budget=10_000)
        for size in (20, 40, 60):  # 8 bytes an element
            w = lease(graphs, size, size)
            assert run(graphs, w, "k", lambda x=w.content.x: x.add_(x * 2), keeps=[w.content.x]) is None
            graphs.give_back(w)
        vars(graphs).update(lower)
        w = lease(graphs, 60, 60)
        assert run(graphs, w, "k", lambda: None) is None, "the last one was used last"
        graphs.give_back(w)
        assert len(graphs()) <= graphs.limit and graphs.bytes <= graphs.budget and graphs()


def test_room_is_made_before_a_graph_is_recorded():
    graphs, seen = Graphs(budget=1000), []
    for size, nbytes in ((50, 0), (80, 300)):  # 8 bytes an element: 400, then 640, and 300 of inputs
        w = lease(graphs, size, size)

        def body(x=w.content.x):
            seen.append(len(graphs()))
            x.add_(x * 2)

        assert run(graphs, w, "k", body, keeps=[w.content.x], nbytes=nbytes) is None
        graphs.give_back(w)
    assert seen == [0, 0, 0, 1, 0, 0] and graphs.bytes == 940, (
        "an eager run, warm-up and recording of each: the first was gone before the second's warm-up began"
    )


def test_least_recently_used_goes_first():
    graphs = Graphs(limit=2)
    w = lease(graphs)
    for key in "abac":
        run(graphs, w, key, lambda: w.content.x.add_(1), keeps=[w.content.x])
    replays = [info.replays for info in graphs()]
    assert replays == [2, 1], "b went, a had been used since"


def test_a_workspace_lasts_as_long_as_its_graphs():
    graphs = Graphs()
    w = lease(graphs)
    graphs.give_back(w)
    assert lease(graphs) is not w, "nothing was recorded over it"
    w = lease(graphs)
    assert run(graphs, w, "k", lambda: w.content.x.add_(1), keeps=[w.content.x]) is None
    graphs.give_back(w)
    assert lease(graphs) is w, "kept, because a graph holds its addresses"


def test_another_device_starts_anew(recorders):
    graphs = Graphs()
    w = lease(graphs)
    run(graphs, w, "k", lambda: w.content.x.add_(1), keeps=[w.content.x])
    graphs.give_back(w)
    graphs.lease("k", torch.device("cpu", 0), content)
    assert len(recorders) == 2 and recorders[0].tapes == [] and graphs() == []


def test_a_reason_names_the_error_that_began_it():
    """torch.cuda.graph ends a broken capture on the way out, and that raises over the body's own error."""
    try:
        try:
            raise ValueError("the cause")
        finally:
            raise RuntimeError("failed due to a previous error during capture")
    except RuntimeError as error:
        assert program.error_text(error) == (
            "ValueError: the cause (then RuntimeError: failed due to a previous error during capture)"
        )
    assert program.error_text(ValueError("alone")) == "ValueError: alone"
