"""Recording and replaying bodies, in the simulator. Faults that a CUDA graph would hide are planted and must show."""

from __future__ import annotations

import pytest
import torch

from fastguard.capture.graphs import Graphs, error_text
from tests.capture.leases import content, lease, run

pytestmark = pytest.mark.usefixtures("recorders")


def test_a_replay_reads_new_contents_in_the_same_places():
    graphs, weight = Graphs(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    w = lease(graphs)
    x = w.x

    def body():
        x.add_(weight * 2)

    for _ in range(3):
        assert run(graphs, w, "add", body) is None
    assert torch.equal(x, weight * 6), "neither warm-up nor recording may leave a trace"
    weight.mul_(10)  # in place: a graph sees it
    x.zero_()
    run(graphs, w, "add", body)
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
        body, between = faulty(kind, w.x)
        for _ in range(4):
            run(graphs, w, "k", body) if recorded else body()
            between()
        results.append(w.x.clone())
    assert not torch.equal(*results)


def test_what_a_body_leaves_in_the_pool_is_worthless():
    graphs, kept = Graphs(), []
    w = lease(graphs)
    run(graphs, w, "k", lambda: kept.append(w.x * 2))
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
    reason = run(graphs, w, "k", lambda: forbidden(w.x))
    assert "capture failed" in reason and "not permitted" in reason
    assert graphs() == [] and not w.x.isnan().any(), "the body ran eagerly instead"
    before = w.x.clone()
    assert run(graphs, w, "other", lambda: w.x.add_(1)) == reason
    assert torch.equal(w.x, before + 1)
    graphs.give_back()
    graphs.clear()
    assert graphs.failure is None
    w = lease(graphs)
    assert run(graphs, w, "other", lambda: w.x.add_(1)) is None


def test_an_error_of_the_body_is_the_callers_and_leaves_the_graphs_alone():
    """Arguments of a wrong shape, say."""
    graphs, weight = Graphs(), torch.ones(4)
    w = lease(graphs)
    x = w.x
    assert run(graphs, w, "good", lambda: x.add_(weight)) is None
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(graphs, w, "bad", lambda: x.add_(torch.ones(3)))
    assert graphs.failure is None and len(graphs()) == 1
    assert run(graphs, w, "good", lambda: None) is None and x.tolist() == [2] * 4


@pytest.mark.parametrize("when", ["by its first run", "by what came of it"])
def test_what_changes_outside_its_tensors_runs_once_and_eagerly(when, recorders):
    """Whoever watches is asked after the first run, before anything is recorded, and again when it was."""
    graphs, looked, runs = Graphs(), [], []
    w = lease(graphs)
    x = w.x

    def watch():
        def changed():
            looked.append(len(runs))
            return "it changed" if len(looked) == (1 if when == "by its first run" else 2) else None

        return changed

    def body():
        runs.append(1)
        x.add_(1)

    assert run(graphs, w, "k", body, watch=watch) == "it changed"
    assert x.tolist() == [1] * 4 and graphs() == [] and recorders[0].tapes == []
    assert looked == ([1] if when == "by its first run" else [1, 3]) and len(runs) == looked[-1]
    assert run(graphs, w, "k", body, watch=watch) is None and x.tolist() == [2] * 4


def test_a_workspace_lasts_as_long_as_its_graphs():
    graphs = Graphs()
    w = lease(graphs)
    graphs.give_back()
    assert lease(graphs) is not w, "nothing was recorded over it"
    w = lease(graphs)
    assert run(graphs, w, "k", lambda: w.x.add_(1)) is None
    graphs.give_back()
    assert lease(graphs) is w, "kept, because a graph holds its addresses"


def test_another_device_starts_anew(recorders):
    graphs = Graphs()
    w = lease(graphs)
    run(graphs, w, "k", lambda: w.x.add_(1))
    graphs.give_back()
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
        assert error_text(error) == (
            "ValueError: the cause (then RuntimeError: failed due to a previous error during capture)"
        )
    assert error_text(ValueError("alone")) == "ValueError: alone"
