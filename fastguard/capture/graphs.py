"""Run a body eagerly or as a graph that was recorded once and is replayed from then on. Knows nothing of diffusion.

A *body* is a function without arguments or result that works on tensors at fixed addresses. Those tensors belong to a *workspace*,
which one call at a time may lease. A graph is kept under a key that must name all that a replay cannot notice: whoever makes the
key (`fastguard.capture.runner`) answers for it, this file answers for memory, order and failure.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastguard.capture import cuda_graphs
from fastguard.capture.program import Program, Recorder, Workspace, error_text, first_error, name

MODES = ("off", "step", "loop", "auto")
BUDGET = 4 << 30  # bytes of pool and workspaces together
LIMIT = 32  # graphs; the driver's own memory for nodes (980 a forward of SD 1.5's UNet, 2,980 of SDXL's) cannot be asked for
CLEARED = "the graphs were given up while this call was running"

# The one place that chooses what records on which type of device; tests add the simulator here.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": cuda_graphs.Recorder}


def records(device: torch.device) -> bool:
    """Whether graphs can be recorded on a device."""
    return device.type in RECORDERS and (device.type != "cuda" or cuda_graphs.available())


def holds(tensor: torch.Tensor) -> bool:
    """Whether a graph can hold the tensor: not a fake one, nor one that somebody watches."""
    return type(tensor) is torch.Tensor


@dataclass(eq=False)
class _Graph:
    recorded: Any
    # Both keep the addresses alive that the graph holds.
    workspace: Workspace
    program: Program
    bytes: int  # by which the pool grew; graphs of equal shapes share what the first of them took
    seconds: float
    replays: int = 0


@dataclass(frozen=True)
class GraphInfo:
    """One recorded graph: a short name of its key, bytes by which it made the shared pool grow, launches, seconds to capture."""

    key: str
    bytes: int
    replays: int
    seconds: float


@dataclass
class Graphs:
    """The graphs of one guard: least recently used go first, until between calls there are at most `budget` bytes and `limit` graphs.

    Call it for a table of what is there.
    """

    budget: int = BUDGET
    limit: int = LIMIT
    failure: str | None = None  # why nothing is recorded any more
    clears: int = 0
    model: Any = None  # what `runner.Model` knows of the denoiser: it goes when the graphs do
    _bounds: tuple[int, int] = (BUDGET, LIMIT)  # the last that were applied to what is there
    _recorder: Recorder | None = None
    _device: torch.device | None = None
    _graphs: OrderedDict[Hashable, _Graph] = field(default_factory=OrderedDict)
    _workspaces: dict[Hashable, Workspace] = field(default_factory=dict)
    _refused: dict[Hashable, str] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)

    def __call__(self) -> list[GraphInfo]:
        """Least recently used first."""
        with self._lock:
            return [GraphInfo(name(key), g.bytes, g.replays, g.seconds) for key, g in self._graphs.items()]

    @property
    def bytes(self) -> int:
        """Pool and workspaces."""
        with self._lock:
            pool = self._recorder.pool_bytes() if self._recorder else 0
            inputs = sum(graph.program.nbytes for graph in self._graphs.values())
            return pool + inputs + sum(w.content.nbytes for w in self._workspaces.values())

    def clear(self) -> None:
        """Forget every graph, and every failure. Calls that have begun record nothing any more: no graph is left behind them."""
        with self._lock:
            self.clears += 1
            self.model = None
            self._forget()

    def _forget(self) -> None:
        self._evict_all()
        for workspace in self._workspaces.values():
            workspace.cleared = True
        self._workspaces = {}
        self._refused.clear()
        self.failure = None
        if self._recorder is not None:
            self._recorder.new_pool()  # whatever a failed capture left in the old one

    def _evict_all(self) -> None:
        while self._graphs:
            self._evict(next(iter(self._graphs)))

    # A call's tensors ------------------------------------------------------------------------------------------------------

    def lease(
        self,
        key: Hashable,
        device: torch.device,
        make: Callable[[], Any],
        *,
        begun: int | None = None,
    ) -> Workspace | None:
        """Tensors for this key, for one call until its `give_back`; what `make` gives the first time.

        begun: `clears` when the call began; None if there was one since.
        """
        with self._lock:
            if begun not in (None, self.clears):
                return None
            if device != self._device:
                self._forget()
                self._device = device
                self._recorder = RECORDERS[device.type](device)
            assert self._recorder is not None
            workspace = self._workspaces.get(key)
            if workspace is None:
                with torch.inference_mode(False):  # so that calls in either mode may write to them
                    workspace = self._workspaces[key] = Workspace(key, make(), self._recorder)
            workspace.leased = True
            self._recorder.join()
            return workspace

    def give_back(self, workspace: Workspace) -> None:
        """Everything that the caller wants to keep is copied; a workspace over which there is no graph is dropped."""
        with self._lock:
            workspace.recorder.join(workspace.content.tensors)
            workspace.leased = False
            self._drop_if_unused(workspace)
            # Looked at when somebody has set them: asking for the pool's size takes a while.
            if self._bounds != (self.budget, self.limit):
                self._bounds = self.budget, self.limit
                self._make_room()

    def _drop_if_unused(self, workspace: Workspace) -> None:
        mine = self._workspaces.get(workspace.key) is workspace
        if mine and not workspace.leased and not workspace.graphs:
            del self._workspaces[workspace.key]

    # Running ---------------------------------------------------------------------------------------------------------------

    def refusal(self, workspace: Workspace, key: Hashable) -> str | None:
        """Why nothing would be recorded under this key."""
        if workspace.cleared:
            return CLEARED
        return self.failure or self._refused.get((workspace.key, key))

    def program(self, workspace: Workspace, key: Hashable, make: Callable[[], Program]) -> Program:
        """The program recorded under this key, else a new one."""
        with self._lock:
            graph = self._graphs.get((workspace.key, key))
            if graph is not None:
                return graph.program
            with torch.inference_mode(False):
                return make()

    def run(self, workspace: Workspace, key: Hashable, program: Program) -> str | None:
        """Run the body once, whose inputs are loaded: as a graph (None), or eagerly (the reason why). Its own errors are raised."""
        whole = (workspace.key, key)
        with self._lock:
            if whole in self._graphs:
                assert self._graphs[whole].program is program
                self._replay(whole)
                return None
            reason = self.refusal(workspace, key)
            if reason is None:
                return self._first_run(whole, workspace, program)
        program.body()
        return reason

    def _replay(self, key: Hashable) -> None:
        graph = self._graphs[key]
        self._graphs.move_to_end(key)
        graph.replays += 1
        graph.workspace.recorder.replay(graph.recorded)

    def _first_run(self, key: Hashable, workspace: Workspace, program: Program) -> str | None:
        """Eagerly, and what comes of that counts unless a graph could be made: its errors, its result, whatever it changed elsewhere."""
        before = [tensor.clone() for tensor in program.keeps]
        changed = program.watch()
        program.body()
        reason = changed() or self._record(key, workspace, program)
        if reason is None and (reason := changed()) is not None:
            self._evict(key)
        if reason is not None:
            return reason
        for tensor, copy in zip(program.keeps, before, strict=True):
            tensor.copy_(copy)
        self._replay(key)
        return None

    def _record(self, key: Hashable, workspace: Workspace, program: Program) -> str | None:
        """Record and keep a graph within the budget; the reason if that cannot be. A capture that fails is the last one."""
        recorder = workspace.recorder
        # What this graph needs alone: nobody knows the whole of it before it is recorded.
        own = workspace.content.nbytes + program.nbytes
        for _ in range(2 if own <= self.budget else 0):
            self._make_room(graphs=1, nbytes=program.nbytes)
            before, start = recorder.pool_bytes(), time.perf_counter()
            try:
                recorded = recorder.record(program.body, program.warm_up or program.body, program.keeps)
            except Exception as error:
                return self._failed(key, error)
            seconds = time.perf_counter() - start
            grown = recorder.pool_bytes() - before
            self._graphs[key] = _Graph(recorded, workspace, program, grown, seconds)
            workspace.graphs += 1
            if self._make_room(but=key):
                return None
            own = workspace.content.nbytes + program.nbytes + grown
            self._evict(key)
            # Blocks of graphs that are gone stay in the pool while a graph is left in it: once more, in an empty pool.
            if not before or self._graphs:
                break
        return self._refuse(key, f"a graph would need {own:,} bytes or more, guard.graphs.budget is {self.budget:,}")

    def _make_room(self, *, graphs: int = 0, nbytes: int = 0, but: Hashable = None) -> bool:
        """Whether so much more is within the bounds, when others went for it, the least recently used first."""
        while len(self._graphs) + graphs > self.limit or self.bytes + nbytes > self.budget:
            oldest = next((key for key in self._graphs if key != but), None)
            if oldest is None:
                return False
            self._evict(oldest)
        return True

    def _failed(self, key: Hashable, error: Exception) -> str:
        """Whatever a model does that no capture allows is the last capture's end; a lack of memory is this graph's alone."""
        if isinstance(first_error(error), torch.OutOfMemoryError):
            if not self._graphs and self._recorder is not None:
                self._recorder.new_pool()  # whatever the failed capture left in the old one
            return self._refuse(key, f"a graph could not be recorded: {error_text(error)}")
        self.failure = f"capture failed, everything runs eagerly from here on: {error_text(error)}"
        self._evict_all()  # nobody would replay them
        return self.failure

    def _refuse(self, key: Hashable, reason: str) -> str:
        while len(self._refused) >= 64:
            del self._refused[next(iter(self._refused))]
        self._refused[key] = reason
        return reason

    def _evict(self, key: Hashable) -> None:
        graph = self._graphs.pop(key)
        recorder = graph.workspace.recorder
        recorder.release(graph.recorded)
        graph.workspace.graphs -= 1
        self._drop_if_unused(graph.workspace)
        if not self._graphs:  # torch asserts that nothing is captured into a pool whose graphs are all gone
            recorder.new_pool()
