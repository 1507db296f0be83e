"""Every call of torch.cuda that capture makes. `fastguard.capture` decides what is recorded and when; this file knows how.

A body recorded here obeys one contract: it reads and writes tensors that live outside the graph's memory pool, and returns
nothing. So no tensor of the pool is ever looked at after a replay, and graphs can share one pool whatever the order in which they
run, as long as no two of them run at the same time: per device, a lock orders their launches and an event their streams.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import cuda

Body = Callable[[], None]
WARM_UPS = 2  # the first builds kernels and library handles for the capturing stream, the second is as any later run

# torch allows one capture at a time in a process, and nobody to empty its cache (of all devices at once) during it.
_alone = threading.RLock()


@functools.cache
def _shared(device: torch.device) -> tuple[Any, Any, Any]:
    """What all recorders of a device share: a lock, for one capture or launch at a time; a stream for captures (the allocator reuses a
    pool's blocks only on the stream that they were made for); an event, the last use of any pool and of the buffers around it (not
    per pool: libraries keep things per stream, and all captures share one)."""
    return threading.RLock(), cuda.Stream(device), cuda.Event()


class Recorder:
    """Records bodies as CUDA graphs on one device, in one memory pool, and replays them. Any thread may call it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with _alone:  # threads that come at once get the same
            self._lock, self._stream, self._used = _shared(device)
        self.new_pool()

    def new_pool(self) -> None:
        """Start an empty pool; the old one goes back to the device if no graph is left in it."""
        with _alone:
            self._pool = cuda.graph_pool_handle()
            # Memory that cannot go back now is not lost: torch gives it back when it runs short.
            with suppress(RuntimeError):
                cuda.empty_cache()

    def record(self, body: Body, warm_up: Body, keeps: Sequence[torch.Tensor]) -> Any:
        """A graph of `body`, which is not run. `warm_up` is, and `keeps` are the tensors that it must leave as they were.

        Whatever this raises, the tensors are restored and the caller's stream is current again.
        """
        with self._lock, cuda.device(self.device):
            caller = cuda.current_stream(self.device)
            self._warm_up(warm_up, keeps, caller)
            graph = cuda.CUDAGraph()
            if _ONE_STATE:
                _own_draws(self.device, graph)
            with _alone, _own_workspace():
                try:
                    # torch.cuda.graph waits for the device and empties the allocator's cache before it begins.
                    # "thread_local": other threads may go on allocating and launching; only what this one must not do is an error.
                    with cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                        body()
                except BaseException:
                    _end_allocation(self.device, self._pool)
                    raise
                finally:
                    cuda.set_stream(caller)  # where ending the capture fails, torch leaves its own stream current
            return graph

    def _warm_up(self, warm_up: Body, keeps: Sequence[torch.Tensor], caller: Any) -> None:
        with self._turn():
            saved = [tensor.clone() for tensor in keeps]
            self._stream.wait_stream(caller)
            try:
                with cuda.stream(self._stream):
                    for _ in range(WARM_UPS):
                        warm_up()
            finally:
                caller.wait_stream(self._stream)
                for tensor, copy in zip(keeps, saved, strict=True):
                    tensor.copy_(copy)

    def replay(self, graph: Any) -> None:
        """Launch on the current stream, after the last launch on this device on whatever stream that was."""
        with self._turn():
            graph.replay()

    def join(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        """The current stream may touch pool and buffers from here on, and what it was told so far comes before all later turns.

        tensors: it worked on them, but whoever frees them need not wait for it: the memory is used again after it is through.
        """
        with self._turn():
            for tensor in tensors:
                tensor.record_stream(cuda.current_stream(self.device))

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Turns on a device follow each other, whatever their streams: each waits for the one before."""
        with self._lock:
            stream = cuda.current_stream(self.device)
            stream.wait_event(self._used)
            try:
                yield
            finally:
                self._used.record(stream)

    def release(self, graph: Any) -> None:
        """Destroy a graph. Waits for the device, because what the graph worked on may be freed next: evictions are rare."""
        with self._lock:
            self._used.synchronize()
            graph.reset()

    def pool_bytes(self) -> int:
        """Device memory that the pool holds. The driver's own memory for a graph's nodes is not in it and cannot be asked for."""
        segments = cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == self._pool)


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Inside, cuBLAS finds no workspace for any stream and makes one; what is captured gets its own, in the graph's pool.

    cuBLAS keeps a workspace per stream, and a graph holds its address but not its memory. One that is left from a warm-up, or in another
    graph's pool, is freed whenever anybody clears it: CUDAGraph.reset does in newer torch (PyTorch issue 193402), Inductor's
    cudagraph trees always did. One made during the capture and given up here goes back to the pool, which lasts until its last
    graph is reset; another graph of that pool may work in the same block, since no two run at once and none reads what it did not write.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


# Up to torch 2.12 a state of a generator is in a capture or not, for all threads; from 2.13 on each capture keeps one for itself.
_ONE_STATE = torch.__version__ < "2.13"


def _own_draws(device: torch.device, graph: Any) -> None:
    """Let a capture of `graph` leave the device's default generator to everybody else.

    Beginning one marks the state that the generator has at that moment, and nothing but ending it well takes the mark off: while it
    lasts, and for good where it fails, draws of all threads would raise, and replays of all graphs that were begun with that state.
    So the state that gets the mark is a copy, which goes when the graph goes. A body that draws has none to draw from, and its
    capture fails. What another thread draws from the copy, in the moment that beginning takes, is drawn again later. Not around
    torch.cuda.graph: that also waits for the device and empties its cache.
    """
    begin, generator = graph.capture_begin, cuda.default_generators[device.index]

    def capture_begin(*args: Any, **kwargs: Any) -> None:
        del graph.capture_begin
        own = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        try:
            begin(*args, **kwargs)
        finally:
            generator.graphsafe_set_state(own)

    graph.capture_begin = capture_begin


def _end_allocation(device: torch.device, pool: Any) -> None:
    """Let the allocator leave a capture that could not be ended. Before torch 2.12 it stays in it for good, and then refuses to empty
    its cache, and asserts where memory runs short; later ones leave by themselves, and refuse to do so twice."""
    for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # the second up to torch 2.7
        with suppress(AttributeError, RuntimeError):
            getattr(torch._C, name)(device.index, pool)
