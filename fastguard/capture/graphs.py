"""Graphs that are recorded once and replayed from then on: their memory, order and failure. Knows nothing of diffusion.

A graph is a body over tensors at fixed addresses: a generation's own, which one call at a time leases, and copies of its arguments.
It is kept under a key that must name all that a replay cannot notice: whoever makes the key (`fastguard.capture.runner`) answers
for it.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fastguard.capture import cuda_graphs
from fastguard.capture.static_inputs import StaticInputs

MODES = ("off", "step", "loop", "auto")
BUDGET = 4 << 30  # bytes of pool, inputs and generations' tensors together
LIMIT = 32  # graphs; the driver's own memory for nodes (980 a forward of SD 1.5's UNet, 2,980 of SDXL's) cannot be asked for

Body = Callable[[Any], None]  # of the arguments
# Called before a body runs for the first time; what it gives says afterwards why a replay would not do the same.
Watch = Callable[[], Callable[[], str | None]]


# The one place that chooses what records on which type of device; tests add the simulator here.
RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": cuda_graphs.Recorder}


def records(device: torch.device) -> bool:
    """Whether graphs can be recorded on a device. Where there is no GPU, tensors that call themselves CUDA ones are make-believe."""
    return device.type in RECORDERS and (device.type != "cuda" or cuda_graphs.cuda.is_available())


def holds(tensor: torch.Tensor) -> bool:
    """Whether a graph can hold the tensor: not a fake one, nor one that somebody watches."""
    return type(tensor) is torch.Tensor


@dataclass
class GraphInfo:
    """One recorded graph: a short name of its key, bytes by which it made the shared pool grow, launches, seconds to capture.

    Graphs of equal shapes share what the first of them took.
    """

    key: str
    bytes: int
    replays: int
    seconds: float


@dataclass(eq=False)
class Graph:
    """A body and the tensors that it works on, whose addresses it keeps alive; and what was recorded of it.

    content  the generation's: has `tensors`, those of them that a body changes in `changed`, and `nbytes`
    """

    content: Any
    inputs: StaticInputs
    body: Body
    recorded: Any = None
    info: Any = None  # GraphInfo, once it is recorded


@dataclass
class Graphs:
    """The graphs of one guard: least recently used go first, until between calls there are at most `budget` bytes and `limit` graphs.

    Call it for a table of what is there. A graph's key is a tuple that begins with the key of its generation's tensors. Whoever
    leases, runs and gives back holds the `lock` meanwhile.
    """

    budget: int = BUDGET
    limit: int = LIMIT
    failure: str | None = None  # why nothing is recorded any more
    model: Any = None  # the `runner.Model` of the denoiser: it goes when the graphs do
    lock: Any = field(default_factory=threading.RLock)
    _bounds: tuple[int, int] = (BUDGET, LIMIT)  # the last that were applied to what is there
    _recorder: Any = None
    _graphs: OrderedDict[tuple, Graph] = field(default_factory=OrderedDict)
    _leased: Any = None  # tensors of the generation that runs: calls of a guard follow each other
    refused: dict[Hashable, str] = field(default_factory=dict)  # why no graph is recorded under these keys

    def __call__(self) -> list[GraphInfo]:
        """Least recently used first."""
        with self.lock:
            return [replace(graph.info) for graph in self._graphs.values()]

    @property
    def bytes(self) -> int:
        """Pool, inputs and generations' tensors."""
        with self.lock:
            pool = self._recorder.pool_bytes() if self._recorder else 0
            parts = [part for graph in self._graphs.values() for part in (graph.inputs, graph.content)]
            held = {id(part): part.nbytes for part in (self._leased, *parts) if part is not None}
            return pool + sum(held.values())

    def clear(self) -> None:
        """Forget every graph, and every failure. Calls that have begun record nothing any more: no graph is left behind them."""
        with self.lock:
            self.model = self.failure = None
            self.refused.clear()
            for key in list(self._graphs):
                self._evict(key)
            if self._recorder is not None:
                self._recorder.new_pool()  # whatever a failed capture left in the old one

    def lease(self, key: Hashable, device: torch.device, make: Callable[[], Any]) -> Any:
        """Tensors for this key, for one call until its `give_back`: those that a graph holds, else what `make` gives."""
        if self._recorder is None or self._recorder.device != device:
            if self._recorder is not None:
                self.clear()  # of the device that the model was on
            self._recorder = RECORDERS[device.type](device)
        self._leased = next((graph.content for (shape, *_), graph in self._graphs.items() if shape == key), None)
        if self._leased is None:
            with torch.inference_mode(False):  # so that calls in either mode may write to them
                self._leased = make()
        self._recorder.join()
        return self._leased

    def give_back(self) -> None:
        """Everything that the caller wants to keep is copied."""
        self._recorder.join(self._leased.tensors)
        self._leased = None
        # Looked at when somebody has set them: asking for the pool's size takes a while.
        if self._bounds != (self.budget, self.limit):
            self._bounds = self.budget, self.limit
            self._make_room()

    def run(self, key: tuple, arguments: Any, body: Body, warm_up: Body, watch: Watch) -> str | None:
        """Run the graph of this key on these arguments; the first time the body, eagerly if no graph comes of it (the reason why). Its own
        errors are raised. warm_up: shows the device everything that the body uses."""
        graph = self._graphs.get(key)
        if graph is None:
            leased = self._leased
            with torch.inference_mode(False):
                graph = Graph(leased, StaticInputs(arguments, leased.tensors[0].device, leased.tensors), body)
        graph.inputs.load(arguments)
        if graph.recorded is None and (reason := self._first_run(key, graph, warm_up, watch)) is not None:
            return reason
        self._graphs.move_to_end(key)
        graph.info.replays += 1
        self._recorder.replay(graph.recorded)
        return None

    def _first_run(self, key: tuple, graph: Graph, warm_up: Body, watch: Watch) -> str | None:
        """Eagerly, and what comes of that counts unless a graph could be made: its errors, its result, whatever it changed elsewhere."""
        before = [tensor.clone() for tensor in graph.content.changed]
        changed = watch()
        graph.body(graph.inputs.tree)
        reason = changed() or self._record(key, graph, warm_up)
        if reason is None and (reason := changed()) is not None:
            self._evict(key)
        if reason is None:
            for tensor, copy in zip(graph.content.changed, before, strict=True):
                tensor.copy_(copy)
        return reason

    def _record(self, key: tuple, graph: Graph, warm_up: Body) -> str | None:
        """Record and keep a graph within the budget; the reason if that cannot be. A capture that fails is the last one."""
        recorder, inputs = self._recorder, graph.inputs
        # What this graph needs alone: nobody knows the whole of it before it is recorded.
        own = graph.content.nbytes + inputs.nbytes
        for _ in range(2 if own <= self.budget else 0):
            self._make_room(graphs=1, nbytes=inputs.nbytes)
            before, start = recorder.pool_bytes(), time.perf_counter()
            try:
                bodies = partial(graph.body, inputs.tree), partial(warm_up, inputs.tree)
                graph.recorded = recorder.record(*bodies, graph.content.changed)
            except Exception as error:
                return self._failed(key, error)
            name, seconds = hashlib.sha256(repr(key).encode()).hexdigest()[:12], time.perf_counter() - start
            graph.info = GraphInfo(name, recorder.pool_bytes() - before, 0, seconds)
            self._graphs[key] = graph
            self._make_room()
            if key in self._graphs:
                return None
            own = graph.content.nbytes + inputs.nbytes + graph.info.bytes
            # Blocks of graphs that are gone stay in the pool while a graph is left in it: once more, in an empty pool.
            if not before:
                break
        self.refused[key] = f"a graph would need {own:,} bytes or more, guard.graphs.budget is {self.budget:,}"
        return self.refused[key]

    def _make_room(self, *, graphs: int = 0, nbytes: int = 0) -> None:
        """Let the least recently used go until so much more is within the bounds, or nothing is left."""
        while self._graphs and (len(self._graphs) + graphs > self.limit or self.bytes + nbytes > self.budget):
            self._evict(next(iter(self._graphs)))

    def _failed(self, key: tuple, error: Exception) -> str:
        """Whatever a model does that no capture allows is the last capture's end; a lack of memory is this graph's alone."""
        if isinstance(_first(error), torch.OutOfMemoryError):
            if not self._graphs:
                self._recorder.new_pool()  # whatever the failed capture left in the old one
            self.refused[key] = f"a graph could not be recorded: {error_text(error)}"
            return self.refused[key]
        self.failure = f"capture failed, everything runs eagerly from here on: {error_text(error)}"
        for kept in list(self._graphs):  # nobody would replay them
            self._evict(kept)
        return self.failure

    def _evict(self, key: tuple) -> None:
        self._recorder.release(self._graphs.pop(key).recorded)
        if not self._graphs:  # torch asserts that nothing is captured into a pool whose graphs are all gone
            self._recorder.new_pool()


def _first(error: BaseException) -> BaseException:
    """The error that began it: ending a capture that the body broke raises an error of its own over it."""
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return error


def error_text(error: BaseException) -> str:
    """An error in a line, with the one that began it."""
    first = _first(error)
    said = [f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else 'no message'}" for e in (first, error)]
    return said[0] if first is error else f"{said[0]} (then {said[1]})"
