"""The order of the torch.cuda calls, against a stand-in that writes them down: every branch of `fastguard.capture.cuda_graphs`."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fastguard.capture import cuda_graphs
from fastguard.capture.graphs import Graphs, records
from tests.capture.fake_cuda import DEVICE, Cuda, in_threads
from tests.capture.leases import content, run


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(cuda_graphs, "cuda", fake)
    cuda_graphs._shared.cache_clear()
    monkeypatch.setattr(cuda_graphs, "_ONE_STATE", True)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_allocation, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", fake.clear_workspaces, raising=False)
    yield fake
    cuda_graphs._shared.cache_clear()


def test_warm_up_capture_and_replay(cuda):
    recorder = cuda_graphs.Recorder(DEVICE)
    cuda.log.clear()
    x, runs = torch.ones(2), []

    def warm_up():
        runs.append(cuda.current_stream(DEVICE).name)
        x.add_(1)

    graph = recorder.record(lambda: runs.append("body"), warm_up, [x])
    assert cuda.log == [
        "on cuda:0",
        "main waits for event",
        "side1 waits for main",
        "main waits for side1",
        "event on main",
        "no workspaces",  # cuBLAS has one from the warm-up, outside the pool
        "capture in pool 1 on side1, thread_local",
        "captured",
        "current is main",
        "no workspaces",  # or the next graph would work in the memory of this one's pool
    ]
    assert runs == ["side1", "side1", "body"], "warm-up on the capturing stream, the body once"
    assert x.tolist() == [1, 1], "what the warm-up changed is put back"
    cuda.log.clear()
    recorder.replay(graph)
    assert cuda.log == ["main waits for event", "replay on main", "event on main"]
    cuda.log.clear()
    recorder.release(graph)
    assert cuda.log == ["host waits for event", "reset"]


@pytest.mark.parametrize("name", ["_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool", None])
def test_the_allocator_leaves_a_broken_capture(cuda, monkeypatch, name):
    """By the name that torch has for it: the second up to 2.7, the first from then on."""
    monkeypatch.delattr(torch._C, "_cuda_endAllocateToPool")
    monkeypatch.delattr(torch._C, "_cuda_endAllocateCurrentStreamToPool", raising=False)
    if name is not None:
        monkeypatch.setattr(torch._C, name, cuda.end_allocation, raising=False)
    cuda.capturing.append((0, 1))
    cuda_graphs._end_allocation(DEVICE, (0, 1))
    assert cuda.capturing == ([] if name else [(0, 1)])
    cuda_graphs._end_allocation(DEVICE, (0, 1))  # what has left by itself refuses, and that is no failure


@pytest.mark.parametrize("where", ["warm-up", "body", "end"])
def test_failures_leave_tensors_and_stream_as_they_were(cuda, where):
    recorder = cuda_graphs.Recorder(DEVICE)
    x = torch.ones(2)

    def warm_up():
        x.add_(1)
        if where == "warm-up":
            raise torch.OutOfMemoryError("no room")

    def body():
        if where == "body":
            raise RuntimeError("operation not permitted when stream is capturing")

    cuda.fail = where
    with pytest.raises(RuntimeError, match="no room" if where == "warm-up" else "captur"):
        recorder.record(body, warm_up, [x])
    assert x.tolist() == [1, 1]
    assert cuda.current_stream(DEVICE).name == "main"
    assert "main waits for side1" in cuda.log and "event on main" in cuda.log
    assert cuda.log[-1] == ("event on main" if where == "warm-up" else "no workspaces")
    assert cuda.capturing == [], "torch before 2.12 leaves the allocator capturing"
    cuda.fail = None
    recorder.new_pool()
    recorder.record(lambda: None, lambda: None, [])


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("where", ["body", "end"])
def test_draws_and_replays_go_on_during_and_after_a_failed_capture(cuda, where, planted, monkeypatch):
    """Planted: the generator's own state is what a capture begins with, as torch.cuda.graph does by itself."""
    monkeypatch.setattr(cuda_graphs, "_ONE_STATE", not planted)
    recorder, generator = cuda_graphs.Recorder(DEVICE), cuda.default_generators[0]
    own = generator.state

    def body():
        if not planted:
            in_threads(generator.draw)
            with pytest.raises(AssertionError):  # a body that draws does not get through its capture
                generator.draw(in_a_capture=True)
        if where == "body":
            raise RuntimeError("operation not permitted when stream is capturing")

    graph = recorder.record(lambda: None, lambda: None, [])
    cuda.fail = where
    with pytest.raises(RuntimeError):
        recorder.record(body, lambda: None, [])
    assert generator.state is own
    if planted:
        with pytest.raises(AssertionError, match="Offset increment"):
            generator.draw()
        with pytest.raises(AssertionError, match="Offset increment"):
            recorder.replay(graph)
    else:
        generator.draw()
        recorder.replay(graph)
        assert "capture_begin" not in vars(graph)


def test_where_each_capture_has_a_state_of_its_own_the_generator_is_left_alone(cuda, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "_ONE_STATE", False)
    monkeypatch.setattr(cuda.default_generators[0], "graphsafe_set_state", None)
    cuda_graphs.Recorder(DEVICE).record(lambda: None, lambda: None, [])


def test_a_cache_that_cannot_be_emptied_is_no_failure(cuda):
    """Somebody else's capture, or one that torch could not end."""
    recorder = cuda_graphs.Recorder(DEVICE)
    cuda.capturing.append((0, 99))
    cuda.log.clear()
    recorder.new_pool()
    assert cuda.log == []


def test_turns_follow_each_other_whatever_their_streams(cuda):
    """A stream that only waited, or only told where it is, would let the next turn overtake one of the two before."""
    recorder = cuda_graphs.Recorder(DEVICE)
    cuda.log.clear()
    recorder.join()
    recorder.join()
    assert cuda.log == ["main waits for event", "event on main"] * 2


def test_one_stream_and_one_lock_per_device_one_pool_per_recorder(cuda):
    first, second = cuda_graphs.Recorder(DEVICE), cuda_graphs.Recorder(DEVICE)
    assert first._lock is second._lock and first._stream is second._stream
    assert cuda_graphs.Recorder(torch.device("cuda", 1))._lock is not first._lock
    for recorder in (first, second):
        recorder.record(lambda: None, lambda: None, [])
    captures = [line for line in cuda.log if line.startswith("capture in")]
    assert captures == [f"capture in pool {n} on side1, thread_local" for n in (1, 2)]
    assert first._used is second._used, "two guards may not use at once what a library keeps for the stream"
    first.new_pool()
    assert cuda.log[-1] == "empty cache"
    first.record(lambda: None, lambda: None, [])
    assert "capture in pool 4 on side1, thread_local" in cuda.log


def test_a_devices_lock_is_one_for_threads_that_come_at_once(cuda, monkeypatch):
    made, stream = [], cuda.Stream

    def slow(device):
        time.sleep(0.05)
        return stream(device)

    monkeypatch.setattr(cuda, "Stream", slow)
    in_threads(lambda: made.append(cuda_graphs.Recorder(DEVICE)), count=4)
    assert len({id(recorder._lock) for recorder in made}) == 1 and len(made) == 4


@pytest.mark.parametrize("other", [DEVICE, torch.device("cuda", 1)], ids=str)
@pytest.mark.parametrize("what", ["new", "clear", "capture"])
def test_nobody_disturbs_a_capture(cuda, what, other):
    """torch has one capture at a time in a process, and asserts that nobody empties its cache meanwhile, of whatever device."""
    recorder, second, began, done = cuda_graphs.Recorder(DEVICE), Graphs(), threading.Event(), threading.Event()
    held = second.lease("shape", other, content)
    run(second, held, "k", lambda: None)
    acts = {
        "new": lambda: Graphs().lease("shape", other, content),
        "clear": second.clear,
        "capture": lambda: run(second, held, "l", lambda: None),
    }

    def act():
        began.wait(10)
        acts[what]()
        done.set()

    began_at = []

    def body():
        began_at.append(len(cuda.log))
        began.set()
        assert not done.wait(0.1)
        told = cuda.log[began_at[0] :]
        harmless = [] if other == DEVICE else ["reset"]  # a graph of another device may go
        assert not {line.split(" ")[0] for line in told} & {"empty", "capture", "reset"} - {*harmless}

    thread = threading.Thread(target=act)
    thread.start()
    recorder.record(body, lambda: None, [])
    thread.join()
    assert done.is_set() and second.failure is None


def test_bytes_of_the_pool(cuda):
    recorder = cuda_graphs.Recorder(DEVICE)
    cuda.segments = [
        {"segment_pool_id": (0, 1), "total_size": 5},
        {"segment_pool_id": (0, 0), "total_size": 70},
        {"segment_pool_id": [0, 1], "total_size": 6},
    ]
    assert recorder.pool_bytes() == 11


def test_other_threads_wait_while_one_launches(cuda):
    recorder, launched = cuda_graphs.Recorder(DEVICE), threading.Event()
    graph = recorder.record(lambda: None, lambda: None, [])
    with recorder._lock:
        thread = threading.Thread(target=lambda: (recorder.replay(graph), launched.set()))
        thread.start()
        assert not launched.wait(0.2)
    assert launched.wait(10)
    thread.join()


def test_capture_uses_it_on_cuda(cuda, monkeypatch):
    """`Graphs` on top: lease, record, replay, evict, in this order."""
    assert records(DEVICE) and not records(torch.device("cpu"))
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert not records(DEVICE)
    graphs = Graphs(limit=1)
    streams = []
    x = torch.ones(2)
    x.record_stream = lambda stream: streams.append(stream.name)
    held = graphs.lease("shape", DEVICE, lambda: content(x))
    assert cuda.log[-2:] == ["main waits for event", "event on main"], "whoever leases writes after the last turn"
    for key in ("a", "a", "b"):
        assert run(graphs, held, key, lambda: None) is None
    graphs.give_back()
    kinds = [line.split(" ")[0] for line in cuda.log if line.split(" ")[0] in ("capture", "replay", "reset")]
    assert kinds == ["capture", "replay", "replay", "reset", "capture", "replay"]
    captures = [line.split(" ")[3] for line in cuda.log if line.startswith("capture in")]
    assert captures == ["1", "2"], "the pool of a graph that was the only one is not taken again"
    assert [info.replays for info in graphs()] == [1]
    assert streams == ["main"], "memory that another stream frees is not used again before this one is through with it"
