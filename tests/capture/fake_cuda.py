"""A stand-in for torch.cuda: writes down what is asked of it, and asserts what torch's allocator asserts."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import torch

DEVICE = torch.device("cuda", 0)


class Generator:
    """Of a device, as far as captures have to do with it."""

    def __init__(self, state=None):
        self.state = state or SimpleNamespace(capturing=False)

    def draw(self, *, in_a_capture=False):
        assert self.state.capturing == in_a_capture, "Offset increment outside graph capture encountered unexpectedly"

    def graphsafe_get_state(self):
        return Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def clone_state(self):
        return Generator()


class Cuda:
    """What `fastguard.capture.cuda_graphs` uses of torch.cuda, written down in `log`."""

    def __init__(self):
        self.log = []
        self.fail = None
        self.segments = []
        self.pools = 0
        self.default_generators = [Generator(), Generator()]
        self.alive = {}  # graphs that are left in a pool
        self.capturing = []  # pools
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
            def capture_begin(self, pool, capture_error_mode):
                """As torch does up to 2.12: the generator's state of now is in a capture, for everybody, until that is ended well."""
                cuda.log.append(
                    f"capture in pool {pool[1]} on {cuda.current_stream(DEVICE).name}, {capture_error_mode}"
                )
                self.state = cuda.default_generators[0].state
                self.state.capturing = True

            def capture_end(self):
                self.state.capturing = False

            def replay(self):
                assert not self.state.capturing, "Offset increment outside graph capture encountered unexpectedly"
                cuda.log.append(f"replay on {cuda.current_stream(DEVICE).name}")

            def reset(self):
                cuda.log.append("reset")
                cuda.alive[self.pool] -= 1

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def stream_of(self, thread):
        return self.current.setdefault(thread, type("Default", (), {"name": "main", **_WAITS(self)})())

    def current_stream(self, device):
        assert device.type == "cuda"
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
        self.log.append(f"on {device}")
        yield

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        """Like torch's: a pool whose graphs are all gone is not taken again; where the capture cannot be ended, the stream stays."""
        assert self.alive.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        assert not self.capturing, "captures_underway.empty() INTERNAL ASSERT FAILED"
        self.current[threading.get_ident()] = stream
        self.capturing.append(pool)
        graph.capture_begin(pool, capture_error_mode=capture_error_mode)
        yield
        if self.fail == "end":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.capturing.remove(pool)
        self.alive[pool] = self.alive.get(pool, 0) + 1
        graph.pool = pool
        graph.capture_end()
        self.log.append("captured")

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    def empty_cache(self):
        """On all devices."""
        if self.capturing:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.log.append("empty cache")

    def end_allocation(self, index, pool):
        if pool not in self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing.remove(pool)

    def clear_workspaces(self):
        self.log.append("no workspaces")

    def memory_snapshot(self):
        return self.segments

    def is_available(self):
        return True

    def synchronize(self, device):
        self.log.append(f"synchronize {device}")


def _WAITS(cuda):
    return {
        "wait_stream": lambda self, other: cuda.log.append(f"main waits for {other.name}"),
        "wait_event": lambda self, event: cuda.log.append("main waits for event"),
    }


def in_threads(work, count=1):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
