"""Run the bodies of one generation: eagerly, or as graphs that are recorded once and replayed. Knows nothing of diffusion.

A body is a function of one tree of arguments, without a result, over tensors that were leased for the generation. Its key names
what was asked for, the arguments' layout and plain values, the model's fingerprint and the options; everything else that may change
from run to run has to be read from tensors.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastguard.capture import graphs
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.graphs import Body, Graph, Graphs
from fastguard.capture.obstacles import surroundings
from fastguard.capture.static_inputs import StaticInputs, signature

# "auto" records where launches take longer than the work: the denoiser's rows (2 B guided, else B) times the latents' positions h w. A
# forward of SD 1.5 / SDXL is about 980 / 2,980 kernels, 5 / 15 ms of launches at 5 us each, whatever the batch. This is SD 1.5
# (64 x 64) up to batch 4 and SDXL (128 x 128) at batch 1; on an H200 graphs save 9 to 62% up to there, 0 to 4% beyond (docs/gpu).
LAUNCH_BOUND = 2 * 4 * 64 * 64

CLEARED = "the graphs were given up while this call was running"
MOVES = (
    "the forward changes the model, writes to its tensors, or draws from Python's or NumPy's random numbers, none of which a replay does "
    "(guard.graphs.clear() looks again)"
)

Arguments = tuple[tuple, dict]


@dataclass(eq=False)
class Model:
    """What a guard keeps of its denoiser from call to call.

    decides  what beside the model decides what it computes (attention, compilation)
    runs     the denoiser as it runs under these
    moves    how often in a row it was found changed by its own forward, by what is recorded
    """

    denoiser: torch.nn.Module
    decides: Hashable
    runs: Any
    moves: dict[Hashable, int] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.denoiser)


class BodyRunner:
    """Runs the bodies of one generation.

    replayed  launches of graphs; reason: why some or all bodies were not among them
    """

    def __init__(self, mode: str, graphs: Graphs, model: Model) -> None:
        self._mode, self._graphs, self._model, self._begun = mode, graphs, model, graphs.clears
        self._shape: Hashable = None
        self._content: Any = None  # what is leased under this shape
        self._print: Hashable = None  # of the model; None: it is to be looked at
        self._obstacle: str | None = None
        self.replayed = 0
        self.reason: str | None = None

    def wants_whole(self, device: torch.device) -> bool:
        """Whether a generation was asked to be one graph, on a device that records."""
        return self._mode == "loop" and graphs.records(device)

    def lease(self, key: Hashable, like: torch.Tensor, make: Callable[[], Any], *, positions: int) -> Any | None:
        """The tensors of an earlier generation of this key, else what `make` gives; None where this one runs eagerly.

        like: a tensor of the generation; positions: what its forward works on, see LAUNCH_BOUND.
        """
        device, mode = like.device, self._mode
        if mode == "off" or (mode == "auto" and not graphs.records(device)):
            return None
        refusal = None
        if not graphs.records(device):
            refusal = f"capture={mode!r}: nothing records graphs on device {device.type!r}"
        elif not graphs.holds(like):
            refusal = f"latents are a {type(like).__name__}, which no graph can hold"
        elif mode == "auto" and positions > LAUNCH_BOUND:
            refusal = f"capture='auto' records up to {LAUNCH_BOUND:,} positions a forward (launches take longer there), here are {positions:,}"
        with self._graphs.lock:
            if self._refused(refusal or self._look(device, again=True)):
                return None
            self._shape, self._content = key, self._graphs.lease(key, device, make)
            self._begun = self._graphs.clears  # the graphs of another device may have gone just now
            return self._content

    def run(
        self, what: Hashable, body: Body, arguments: Arguments, *, warm_up: Body | None = None, look_again: bool = False
    ) -> None:
        """Run `body(arguments)`, as a graph where that can be.

        warm_up: shows the device everything that the body uses; the body itself unless given.
        look_again: somebody may have changed the model since the last run.
        """
        with self._graphs.lock:
            key = None if self._content is None else self._key(what, arguments, look_again)
            if key is not None:
                self._run(key, body, arguments, warm_up or body)
                return
        body(arguments)

    def give_back(self) -> None:
        """The generation is over; what it returned is copied."""
        if self._content is not None:
            with self._graphs.lock:
                self._graphs.give_back()
            self._content = None

    def _refused(self, reason: str | None) -> bool:
        self.reason = reason or self.reason
        return reason is not None

    def _look(self, device: torch.device, *, again: bool) -> str | None:
        """Take the model's fingerprint, if it is not known or `again`; why nothing must be recorded."""
        if again or self._print is None:
            self._print = self._model.fingerprint()
            self._obstacle = self._model.fingerprint.obstacle or surroundings(device)
        return CLEARED if self._graphs.clears != self._begun else self._graphs.failure or self._obstacle

    def _key(self, what: Hashable, arguments: Arguments, look_again: bool) -> tuple | None:
        """What the graph of a run is kept under: its place (what is asked for) and who computes it. None where it must not be one."""
        tensors = self._content.tensors
        obstacle = self._look(tensors[0].device, again=look_again)
        try:
            place = (self._shape, what, signature(arguments, tensors))
        except ValueError as error:
            self.reason = str(error)
            return None
        key = (*place, self._print, self._model.decides, os.environ.get("FASTGUARD_BACKEND"))
        refused = self._refused(obstacle or self._graphs.refusal(key) or self._moving(place))
        return None if refused else key

    def _run(self, key: tuple, body: Body, arguments: Arguments, warm_up: Body) -> None:
        content, place = self._content, key[:3]

        def make() -> Graph:
            inputs = StaticInputs(arguments, content.tensors[0].device, content.tensors)
            return Graph(content, inputs, body, warm_up, lambda: self._watch(place))

        if not self._refused(self._graphs.run(key, arguments, make)):
            self.replayed += 1
            self._model.moves.pop(place, None)

    def _watch(self, place: tuple) -> Callable[[], str | None]:
        """Begin to look at the model; what this gives says whether it is still the one that the key names, written to by nobody."""
        fingerprint, moves = self._model.fingerprint, self._model.moves
        written, drawn = fingerprint.written(), [_drawn()]

        def moved() -> str | None:
            # Random numbers are looked at over the first run alone: a capture takes long, and other threads draw from these, too.
            same = fingerprint() == self._print and (not drawn or _drawn() == drawn.pop())
            if same and fingerprint.written() == written:
                return None
            self._print = None  # taken again before the next run
            moves[place] = moves.get(place, 0) + 1
            return self._moving(place) or "the model's first forward changed it (it may have made itself ready)"

        return moved

    def _moving(self, place: tuple) -> str | None:
        """Once may be what a model does in its first forward to make itself ready."""
        return MOVES if self._model.moves.get(place, 0) > 1 else None


def _drawn() -> tuple[Any, ...]:
    """Where Python's and NumPy's global generators are."""
    return random.getstate(), pickle.dumps(np.random.get_state())
