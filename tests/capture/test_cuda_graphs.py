"""The order of the torch.cuda calls, against a stand-in that writes them down: every branch of `fastguard.capture.cuda_graphs`."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from fastguard.capture import cuda_graphs
from fastguard.capture.graphs import Graphs, Program, records

DEVICE = torch.device("cuda", 0)


class Cuda:
    """What `fastguard.capture.cuda_graphs` uses of torch.cuda, written down in `log`."""

    def __init__(self):
        self.log = []
        self.fail = None
        self.segments = []
        self.current = {}
        self.streams = 0
        self.stream_of(threading.get_ident())
        cuda = self

        class Stream:
            def __init__(self, device):
                cuda.streams += 1
                self.name = f"side{cuda.streams}"

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                cuda.log.append(f"{self.name} waits for event")

        class Event:
            def record(self, stream):
                cuda.log.append(f"event on {stream.name}")

            def synchronize(self):
                cuda.log.append("host waits for event")

        class CUDAGraph:
            def replay(self):
                cuda.log.append(f"replay on {cuda.current_stream(DEVICE).name}")

            def reset(self):
                cuda.log.append("reset")

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def stream_of(self, thread):
        return self.current.setdefault(thread, type("Default", (), {"name": "main", **_WAITS(self)})())

    def current_stream(self, device):
        assert device == DEVICE
        return self.stream_of(threading.get_ident())

    def set_stream(self, stream):
        self.log.append(f"current is {stream.name}")
        self.current[threading.get_ident()] = stream

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.current_stream(DEVICE)
        self.current[threading.get_ident()] = stream
        try:
            yield
        finally:
            self.current[threading.get_ident()] = before

    @contextlib.contextmanager
    def device(self, device):
        assert device == DEVICE
        yield

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        """Like torch's: where the capture cannot be ended, the stream stays."""
        self.log.append(f"capture in pool {pool[1]} on {stream.name}, {capture_error_mode}")
        self.current[threading.get_ident()] = stream
        yield
        if self.fail == "end":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.log.append("captured")

    def graph_pool_handle(self):
        self.pools = getattr(self, "pools", 0) + 1
        return (0, self.pools)

    def empty_cache(self):
        self.log.append("empty cache")

    def memory_snapshot(self):
        return self.segments

    def is_available(self):
        return True

    def synchronize(self, device):
        self.log.append(f"synchronize {device}")

    def reset_peak_memory_stats(self, device):
        self.log.append("reset peak")

    def max_memory_allocated(self, device):
        return 123


def _WAITS(cuda):
    return {
        "wait_stream": lambda self, other: cuda.log.append(f"main waits for {other.name}"),
        "wait_event": lambda self, event: cuda.log.append("main waits for event"),
    }


@pytest.fixture
def cuda(monkeypatch):
    cuda_graphs._capture_stream.cache_clear()
    cuda_graphs._last_use.cache_clear()
    fake = Cuda()
    monkeypatch.setattr(cuda_graphs, "cuda", fake)
    yield fake
    cuda_graphs._capture_stream.cache_clear()
    cuda_graphs._last_use.cache_clear()


def test_warm_up_capture_and_replay(cuda):
    recorder = cuda_graphs.Recorder(DEVICE)
    cuda.log.clear()
    x, runs = torch.ones(2), []

    def warm_up():
        runs.append(cuda.current_stream(DEVICE).name)
        x.add_(1)

    graph = recorder.record(lambda: runs.append("body"), warm_up, [x])
    assert cuda.log == [
        "side1 waits for main",
        "main waits for side1",
        "capture in pool 1 on side1, thread_local",
        "captured",
        "current is main",
    ]
    assert runs == ["side1", "side1", "body"], "warm-up on the capturing stream, the body once"
    assert x.tolist() == [1, 1], "what the warm-up changed is put back"
    cuda.log.clear()
    recorder.replay(graph)
    assert cuda.log == ["main waits for event", "replay on main", "event on main"]
    cuda.log.clear()
    recorder.release(graph)
    assert cuda.log == ["host waits for event", "reset"]


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
    assert "main waits for side1" in cuda.log


def test_one_stream_and_one_lock_per_device_one_pool_per_recorder(cuda):
    first, second = cuda_graphs.Recorder(DEVICE), cuda_graphs.Recorder(DEVICE)
    assert first.lock is second.lock
    assert cuda_graphs.device_lock(torch.device("cuda", 1)) is not first.lock
    for recorder in (first, second):
        recorder.record(lambda: None, lambda: None, [])
    captures = [line for line in cuda.log if line.startswith("capture in")]
    assert captures == [f"capture in pool {n} on side1, thread_local" for n in (1, 2)]
    assert first._used is second._used, "two guards may not use the stream's cuBLAS workspace at once"
    first.new_pool()
    assert cuda.log[-1] == "empty cache"
    first.record(lambda: None, lambda: None, [])
    assert "capture in pool 3 on side1, thread_local" in cuda.log


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
    with recorder.lock:
        thread = threading.Thread(target=lambda: (recorder.replay(graph), launched.set()))
        thread.start()
        assert not launched.wait(0.2)
    assert launched.wait(10)
    thread.join()


def test_clock(cuda):
    cuda_graphs.finish(torch.device("cpu"))
    assert "synchronize cuda:0" not in cuda.log
    cuda_graphs.finish(DEVICE)
    assert cuda.log[-1] == "synchronize cuda:0"


def test_capture_uses_it_on_cuda(cuda, monkeypatch):
    """`Graphs` on top: lease, record, replay, evict, in this order."""
    assert records(DEVICE) and not records(torch.device("cpu"))
    monkeypatch.setattr(cuda, "is_available", lambda: False)
    assert not records(DEVICE)
    graphs = Graphs(limit=1)
    content = type("Content", (), {"nbytes": 8})()
    workspace = graphs.lease("shape", DEVICE, lambda: content)
    for key in ("a", "a", "b"):
        program = graphs.program(workspace, key, lambda: Program(lambda: None))
        assert graphs.run(workspace, key, program) is None
    graphs.give_back(workspace)
    kinds = [line.split(" ")[0] for line in cuda.log if line.split(" ")[0] in ("capture", "replay", "reset")]
    assert kinds == ["capture", "replay", "replay", "reset", "capture", "replay"]
    assert [info.replays for info in graphs()] == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_graph():
    graphs = Graphs()
    device = torch.device("cuda", torch.cuda.current_device())
    content = type("Content", (), {"nbytes": 4096})()
    content.x = torch.zeros(1024, device=device)
    workspace = graphs.lease("shape", device, lambda: content)
    weight = torch.arange(1024.0, device=device)

    def body():
        content.x.add_(weight * 2)

    for _ in range(3):
        program = graphs.program(workspace, "k", lambda: Program(body, keeps=[content.x]))
        assert graphs.run(workspace, "k", program) is None
    assert torch.equal(content.x, weight * 6)
    graphs.give_back(workspace)
    assert graphs()[0].bytes > 0 and graphs()[0].replays == 3
