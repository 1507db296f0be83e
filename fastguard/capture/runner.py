"""Run the bodies of one generation: eagerly, or as graphs that are recorded once and replayed. Knows nothing of diffusion.

A body is a function of one tree of arguments, without a result, over tensors that were leased for the generation. Its key names
what was asked for, the arguments' layout and plain values, the model's fingerprint and the options; everything else that may change
from run to run has to be read from tensors.
"""

import os
import pickle
import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastguard.capture import graphs
from fastguard.capture.attention import Attention
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.graphs import Body, Graphs
from fastguard.capture.obstacles import surroundings
from fastguard.capture.static_inputs import signature

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


class Model:
    """A guard's denoiser from call to call, with its attention computed by the named backend, and compiled by these arguments (None: as it is).

    decides  these: what beside the denoiser decides what it computes
    moves    how often in a row it was found changed by its own forward, by what is recorded
    """

    def __init__(self, denoiser: torch.nn.Module, attention: str | None, compile: Mapping[str, Any] | None) -> None:
        self.denoiser, self.decides, self._attention = denoiser, (attention, repr(compile)), attention
        # The module is not changed; its weights, LoRA scales and so on stay its own.
        self._runs: Any = denoiser if compile is None else torch.compile(denoiser, **compile)
        self._asks_unseen = False  # it asks, but its compiled form, which counts nothing, does not show it
        self.moves: Counter[Hashable] = Counter()

    @cached_property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.denoiser)

    def in_a_call(self) -> Callable[..., Any]:
        """For one call of the pipeline.

        ValueError at its first row if the denoiser asks for no attention: its processors compute it by themselves. (Later rows may skip
        it: diffusers' caches do.) Of a compiled denoiser the first call alone is looked at.
        """
        if self._attention is None:
            return self._runs
        attention = Attention(self._attention)

        def row(*args: Any, **kwargs: Any) -> Any:
            with attention:
                result = self._runs(*args, **kwargs)
            if not (attention.asked or self._asks_unseen):
                self._ask_as_written(attention, args, kwargs)
            return result

        return row

    def _ask_as_written(self, attention: Attention, args: tuple, kwargs: dict) -> None:
        with torch.compiler.set_stance("force_eager"), attention:
            self.denoiser(*args, **kwargs)
        self._asks_unseen = attention.asked
        if not attention.asked:
            raise ValueError(
                f"attention_backend={self._attention!r}: {type(self.denoiser).__name__} never calls scaled_dot_product_attention of torch, "
                f"so nothing would change; set processors that do (AttnProcessor2_0), or attention_backend=None"
            )


class BodyRunner:
    """Runs the bodies of one generation.

    denoiser  as they shall run it
    replayed  launches of graphs; reason: why some or all bodies were not among them
    """

    def __init__(self, mode: str, graphs: Graphs, model: Model) -> None:
        self._mode, self._graphs, self._model = mode, graphs, model
        self.denoiser = model.in_a_call()
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
            self._graphs.model = self._model  # the graphs of another device may have gone just now
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
                place = key[:3]
                reason = self._graphs.run(key, arguments, body, warm_up or body, lambda: self._watch(place))
                if not self._refused(reason):
                    self.replayed += 1
                    self._model.moves.pop(place, None)
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
        cleared = self._graphs.model is not self._model
        return CLEARED if cleared else self._graphs.failure or self._obstacle

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
        refused = self._refused(obstacle or self._graphs.refused.get(key) or self._moving(place))
        return None if refused else key

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
            moves[place] += 1
            return self._moving(place) or "the model's first forward changed it (it may have made itself ready)"

        return moved

    def _moving(self, place: tuple) -> str | None:
        """Once may be what a model does in its first forward to make itself ready."""
        return MOVES if self._model.moves[place] > 1 else None


def _drawn() -> tuple[Any, ...]:
    """Where Python's and NumPy's global generators are."""
    return random.getstate(), pickle.dumps(np.random.get_state())
