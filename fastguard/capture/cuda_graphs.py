"""Every call of torch.cuda that capture makes. `fastguard.capture` decides what is recorded and when; this file knows how.

A body recorded here obeys one contract: it reads and writes tensors that live outside the graph's memory pool, and returns
nothing. So no tensor of the pool is ever looked at after a replay, and graphs can share one pool whatever the order in which they
run, as long as no two of them run at the same time: per device, a lock orders their launches and an event their streams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import cuda

WARM_UPS = 2  # the first builds kernels and library handles for the capturing stream, the second is as any later run

Body = Callable[[], None]


@lru_cache(maxsize=64)
def device_lock(device: torch.device) -> threading.RLock:  # type: ignore[valid-type]
    """One capture or launch at a time on a device, whichever guard makes it."""
    return threading.RLock()


@lru_cache(maxsize=64)
def _capture_stream(device: torch.device) -> Any:
    """One per device: the allocator reuses a pool's blocks only on the stream that they were made for."""
    return cuda.Stream(device)


@lru_cache(maxsize=64)
def _last_use(device: torch.device) -> Any:
    """Of any pool and of the buffers around it. One per device, not per pool: graphs captured on one stream also share its cuBLAS
    workspace."""
    return cuda.Event()


class Recorder:
    """Records bodies as CUDA graphs on one device, in one memory pool, and replays them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lock = device_lock(device)
        self._used = _last_use(device)
        self.new_pool()

    def new_pool(self) -> None:
        """Start an empty pool; the old one goes back to the device if no graph is left in it."""
        self._pool = cuda.graph_pool_handle()
        cuda.empty_cache()

    def record(self, body: Body, warm_up: Body, keeps: Sequence[torch.Tensor]) -> Any:
        """A graph of `body`, which is not run. `warm_up` is, and `keeps` are the tensors that it must leave as they were.

        Whatever this raises, the tensors are restored and the caller's stream is current again.
        """
        with cuda.device(self.device):
            caller, side = cuda.current_stream(self.device), _capture_stream(self.device)
            saved = [tensor.clone() for tensor in keeps]
            side.wait_stream(caller)
            try:
                with cuda.stream(side):
                    for _ in range(WARM_UPS):
                        warm_up()
            finally:
                caller.wait_stream(side)
                for tensor, copy in zip(keeps, saved, strict=True):
                    tensor.copy_(copy)
            graph = cuda.CUDAGraph()
            try:
                # torch.cuda.graph waits for the device and empties the allocator's cache before it begins.
                # "thread_local": other threads may go on allocating and launching; only what this one must not do is an error.
                with cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    body()
            finally:
                cuda.set_stream(caller)  # where ending the capture fails, torch leaves `side` current
        return graph

    def replay(self, graph: Any) -> None:
        """Launch on the current stream, after the last launch on this device on whatever stream that was."""
        with self.lock:
            self.enter()
            graph.replay()
            self.leave()

    def enter(self) -> None:
        """From here on the current stream may touch pool and buffers."""
        cuda.current_stream(self.device).wait_event(self._used)

    def leave(self) -> None:
        """All that the current stream was told so far comes before the next `enter`."""
        self._used.record(cuda.current_stream(self.device))

    def release(self, graph: Any) -> None:
        """Destroy a graph. Waits for the device, because what the graph worked on may be freed next: evictions are rare."""
        self._used.synchronize()
        graph.reset()

    def pool_bytes(self) -> int:
        """Device memory that the pool holds. The driver's own memory for a graph's nodes is not in it and cannot be asked for."""
        segments = cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == self._pool)


def available() -> bool:
    """Whether there is a device at all: without one, tensors that call themselves CUDA ones are make-believe."""
    return bool(cuda.is_available())


def finish(device: torch.device) -> None:
    """Wait for the device, for a clock that is about to be read."""
    if device.type == "cuda":
        cuda.synchronize(device)
