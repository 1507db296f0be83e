"""Run the bodies of one generation: eagerly, or as graphs that are recorded once and replayed. Knows nothing of diffusion.

A body is a function of one tree of arguments, without a result, over tensors that were leased for the generation. Its key names
what was asked for, the arguments' layout and plain values, the model's fingerprint and the options; everything else that may change
from run to run has to be read from tensors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastguard.capture import graphs
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.graphs import Graphs
from fastguard.capture.program import Program, Workspace
from fastguard.capture.static_inputs import StaticInputs, signature, unhashable
from fastguard.capture.switches import surroundings

# "auto" records where launches take longer than the work: the denoiser's rows (2 B guided, else B) times the latents' positions h w. A
# forward of SD 1.5 / SDXL is about 980 / 2,980 kernels, 5 / 15 ms of launches at 5 us each, whatever the batch. This is SD 1.5
# (64 x 64) up to batch 4 and SDXL (128 x 128) at batch 1; on an H200 graphs save 9 to 62% up to there, 0 to 4% beyond (docs/gpu).
LAUNCH_BOUND = 2 * 4 * 64 * 64

MOVES = (
    "the forward changes the model, writes to its tensors, or draws from Python's or NumPy's random numbers, none of which a replay does "
    "(guard.graphs.clear() looks again)"
)

Arguments = tuple[tuple, dict]
Body = Callable[[Arguments], None]


class Model:
    """What a guard keeps of its denoiser from call to call.

    decides  what beside the model decides what it computes (attention, compilation)
    runs     the denoiser as it runs under these
    moves    how often in a row it was found changed by its own forward, by what is recorded
    """

    def __init__(self, denoiser: torch.nn.Module, decides: Hashable, runs: Any = None) -> None:
        self.denoiser, self.decides, self.runs = denoiser, decides, runs
        self.moves: dict[Hashable, int] = {}

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.denoiser)


class BodyRunner:
    """Runs the bodies of one generation.

    replayed  launches of graphs; reason: why some or all bodies were not among them
    """

    def __init__(self, mode: str, graphs: Graphs, model: Model) -> None:
        self._mode, self._graphs, self._model, self._begun = mode, graphs, model, graphs.clears
        self._workspace: Workspace | None = None
        self._print: Hashable = None
        self.replayed = 0
        self.reason: str | None = None

    def wants_whole(self, device: torch.device) -> bool:
        """Whether a generation was asked to be one graph, on a device that records."""
        return self._mode == "loop" and graphs.records(device)

    def lease(self, key: Hashable, like: torch.Tensor, make: Callable[[], Any], *, positions: int) -> Any | None:
        """The tensors of an earlier generation of this key, else what `make` gives; None where this one runs eagerly.

        like: a tensor of the generation; positions: what its forward works on, see LAUNCH_BOUND.
        """
        if self._mode == "off" or (self._mode == "auto" and not graphs.records(like.device)):
            return None
        refusal = self._refusal(like, positions)
        self.reason = refusal or self.reason
        if refusal is not None or not self._may_record(like.device):
            return None
        self._workspace = self._graphs.lease(key, like.device, make, begun=self._begun)
        if self._workspace is None:
            self.reason = graphs.CLEARED
            return None
        return self._workspace.content

    def _refusal(self, like: torch.Tensor, positions: int) -> str | None:
        """Why a generation of this device and size is not recorded."""
        if not graphs.records(like.device):
            return f"capture={self._mode!r}: nothing records graphs on device {like.device.type!r}"
        if not graphs.holds(like):
            return f"latents are a {type(like).__name__}, which no graph can hold"
        if self._mode == "auto" and positions > LAUNCH_BOUND:
            return f"capture='auto' records up to {LAUNCH_BOUND:,} positions a forward (launches take longer there), here are {positions:,}"
        return None

    def run(
        self, what: Hashable, body: Body, arguments: Arguments, *, warm_up: Body | None = None, look_again: bool = False
    ) -> None:
        """Run `body(arguments)`, as a graph where that can be.

        warm_up: shows the device everything that the body uses; the body itself unless given.
        look_again: somebody may have changed the model since the last run.
        """
        if not self._replay(what, body, arguments, warm_up or body, look_again):
            body(arguments)

    def give_back(self) -> None:
        """The generation is over; what it returned is copied."""
        if self._workspace is not None:
            self._graphs.give_back(self._workspace)
            self._workspace = None

    # Recording -------------------------------------------------------------------------------------------------------------

    def _may_record(self, device: torch.device) -> bool:
        """Look at the model: take its fingerprint, or the reason against recording it."""
        fingerprint = self._model.fingerprint
        self._print = fingerprint()
        found = self._graphs.failure or fingerprint.obstacle or surroundings(device)
        self.reason = found or self.reason
        return found is None

    def _replay(self, what: Hashable, body: Body, arguments: Arguments, warm_up: Body, look_again: bool) -> bool:
        """False: nothing was run, `reason` says why."""
        workspace = self._workspace
        if workspace is None:
            return False
        tensors = workspace.content.tensors
        device = tensors[0].device
        if (look_again or self._print is None) and not self._may_record(device):
            return False
        if (problem := unhashable(arguments)) is not None:
            self.reason = f"{problem}: nobody can tell whether it changes"
            return False
        layout = signature(arguments, tensors)
        key = (what, layout, self._print, self._model.decides, os.environ.get("FASTGUARD_BACKEND"))
        place = (workspace.key, what, layout)
        if (refusal := self._graphs.refusal(workspace, key) or self._moving(place)) is not None:
            self.reason = refusal
            return False

        def program() -> Program:
            inputs = StaticInputs(arguments, device, tensors)
            return Program(
                body=lambda: body(inputs.tree),
                warm_up=lambda: warm_up(inputs.tree),
                inputs=inputs,
                keeps=workspace.content.changed,
                nbytes=inputs.nbytes,
            )

        found = self._graphs.program(workspace, key, lambda: replace(program(), watch=lambda: self._watch(place)))
        found.inputs.load(arguments)
        failed = self._graphs.run(workspace, key, found)
        self.reason = failed or self.reason
        self.replayed += failed is None
        if failed is None:
            self._model.moves.pop(place, None)
        return True

    def _watch(self, place: Hashable) -> Callable[[], str | None]:
        """Begin to look at the model; what this gives says whether it is still the one that the key names, written to by nobody."""
        fingerprint, moves = self._model.fingerprint, self._model.moves
        written, drawn = fingerprint.written(), [_drawn()]

        def moved() -> str | None:
            # Random numbers are looked at over the first run alone: a capture takes long, and other threads draw from these, too.
            same = fingerprint() == self._print and (not drawn or _drawn() == drawn.pop())
            pairs = zip(written, fingerprint.written(), strict=True)
            if same and all(tensor is other and count == again for (tensor, count), (other, again) in pairs):
                return None
            self._print = None  # taken again before the next run
            moves[place] = moves.get(place, 0) + 1
            return self._moving(place) or "the model's first forward changed it (it may have made itself ready)"

        return moved

    def _moving(self, place: Hashable) -> str | None:
        """Once may be what a model does in its first forward to make itself ready."""
        again = self._model.moves.get(place, 0) > 1
        return MOVES if again else None


def _drawn() -> tuple[Any, ...]:
    """Where Python's and NumPy's global generators are."""
    numpy: Any = np.random.get_state()
    return random.getstate(), *(part.tobytes() if isinstance(part, np.ndarray) else part for part in numpy)
