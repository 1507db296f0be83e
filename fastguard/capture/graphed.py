"""What one guarded call records and replays: a step of the loop, or the whole generation.

    step   denoiser and guided step are one graph; the stock loop goes on and each row is one launch
    loop   the rows of a whole generation are one graph; the stock loop is told that there is a single row

Both run the same `_row`, eagerly or recorded. A graph's key names the branches that it runs, the arguments' layout and plain
values, the model's fingerprint and the options; everything else (schedule, scale, policy, prompts, latents, noise) is read from
tensors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fastguard.capture import graphs
from fastguard.capture.fingerprint import Fingerprint
from fastguard.capture.graphs import Graphs, Program, Workspace
from fastguard.capture.static_inputs import StaticInputs, signature, unhashable
from fastguard.capture.static_loop import LoopShape, StaticLoop
from fastguard.capture.switches import surroundings
from fastguard.pipelines.outputs import select_branch
from fastguard.policies.plan import Plan
from fastguard.schedules.schedule import Schedule

# "auto" records where launches take longer than the work: the denoiser's rows (2 B guided, else B) times the latents' positions h w. A forward of
# SD 1.5 / SDXL is about 980 / 2,980 kernels, 5 / 15 ms of launches at 5 us each, whatever the batch. This is SD 1.5
# (64 x 64) up to batch 4 and SDXL (128 x 128) at batch 1; on an H200 graphs save 9 to 62% up to there, 0 to 4% beyond (docs/gpu).
LAUNCH_BOUND = 2 * 4 * 64 * 64

MOVES = (
    "the forward changes the model, writes to its tensors, or draws from Python's or NumPy's random numbers, none of which a replay does "
    "(guard.graphs.clear() looks again)"
)

Arguments = tuple[tuple, dict]


@dataclass(frozen=True)
class Capturing:
    """What a guard lends to a call.

    options  whatever else decides what the denoiser computes (attention, compilation)
    begun    `graphs.clears` when the call began
    moves    how often in a row the model was found changed by its own forward, by what is recorded
    """

    mode: str
    graphs: Graphs
    fingerprint: Callable[[], Fingerprint]
    options: Hashable = None
    refusal: str | None = None
    begun: int | None = None
    moves: dict[Hashable, int] = field(default_factory=dict)

    def available(self, device: torch.device) -> bool:
        return self.mode != "off" and graphs.records(device)


class Graphed:
    """The recorded part of one call.

    loop      the tensors of the generation; None: the call runs on its own
    whole     the stock loop has one row, `generation` runs them all
    replayed  launches; reason: why some or all rows were not among them
    """

    def __init__(self, capturing: Capturing, denoiser: Callable[..., Any]) -> None:
        self._capturing, self._graphs, self._denoiser = capturing, capturing.graphs, denoiser
        self._workspace: Workspace | None = None
        self._print: Hashable = None
        self.loop: Any = None  # StaticLoop
        self.whole = False
        self.replayed = 0
        self.reason: str | None = None

    # Start and end ---------------------------------------------------------------------------------------------------------

    def may_be_whole(self, pipe: Any) -> bool:
        """Whether this generation was asked to be one graph, on a device that records (finding it walks through all modules)."""
        return self._capturing.mode == "loop" and self._capturing.available(pipe._execution_device)

    def make_whole(self, device: torch.device, obstacle: str | None) -> None:
        """Become one graph, unless there is an obstacle: then each row may still be one."""
        if obstacle is not None:
            self.reason = f"capture='loop' became 'step': {obstacle}"
        self.whole = obstacle is None and self._may_record(device)

    def lease(
        self,
        latents: torch.Tensor,
        schedule: Schedule,
        plan: Plan,
        *,
        halves: int,
        noise_dtype: torch.dtype,
    ) -> StaticLoop | None:
        """Tensors for this generation, loaded; None if it runs eagerly on its own."""
        device, mode = latents.device, self._capturing.mode
        if not self._capturing.available(device):
            if mode in ("step", "loop"):
                self.reason = f"capture={mode!r}: nothing records graphs on device {device.type!r}"
            return None
        held = graphs.holds(latents)
        if not held:
            self.reason = f"latents are a {type(latents).__name__}, which no graph can hold"
            if not self.whole:
                return None
        positions = halves * latents[:, 0].numel()
        if mode == "auto" and positions > LAUNCH_BOUND:
            self.reason = f"capture='auto' records up to {LAUNCH_BOUND:,} positions a forward (launches take longer there), here are {positions:,}"
            return None
        if not self.whole and not self._may_record(device):
            return None
        shape = LoopShape.of(latents, schedule, halves=halves, whole=self.whole, noise_dtype=noise_dtype)
        begun = self._capturing.begun
        if held:
            self._workspace = self._graphs.lease(shape, device, lambda: StaticLoop(shape), begun=begun)
            if self._workspace is None:
                since = begun is not None and begun != self._graphs.clears
                self.reason = graphs.CLEARED if since else "another call of this shape is using the graphs' tensors"
        if self._workspace is not None:
            self.loop = self._workspace.content
        elif self.whole:  # the stock loop has been cut to one row: all of them run here, unrecorded
            self.loop = StaticLoop(shape)
        if self.loop is not None:
            self.loop.load(schedule, plan, latents)
        return self.loop

    def resident(self, sample: torch.Tensor) -> torch.Tensor | None:
        """A denoiser input of the loop's own shape, copied to where graphs read it."""
        if self.loop is None or sample.shape != self.loop.model_input.shape:
            return None
        return self.loop.model_input.copy_(sample)

    def give_back(self) -> None:
        """The call is over; what it returns is copied."""
        if self._workspace is not None:
            self._graphs.give_back(self._workspace)
            self._workspace = None

    def _may_record(self, device: torch.device) -> bool:
        """Look at the model: take its fingerprint, or the reason against recording it."""
        fingerprint = self._capturing.fingerprint()
        self._print = fingerprint()
        found = self._capturing.refusal or self._graphs.failure or fingerprint.obstacle or surroundings(device)
        self.reason = found or self.reason
        return found is None

    # Rows ------------------------------------------------------------------------------------------------------------------

    def step(self, arguments: Arguments, branches: str, *, channels: int, observed: bool) -> bool:
        """Run denoiser and guided step of one row; False if they are left to the caller.

        `observed`: somebody runs between the rows, so the model is not taken to be as it was.
        """
        if (observed or self._print is None) and not self._may_record(self.loop.x.device):
            return False

        def make(inputs: StaticInputs) -> Program:
            return self._program(inputs, lambda tree: self._row(tree, branches, channels, 0))

        return self._replay(("step", branches, channels), arguments, make)

    def generation(
        self,
        arguments: Arguments,
        branches: Sequence[str],
        draws: Sequence[int],
        *,
        channels: int,
    ) -> None:
        """Run all rows, whose noise has been drawn."""
        loop = self.loop
        batch = len(loop.x)

        def row(tree: Arguments, k: int) -> None:
            if branches[k] != "both" and len(loop.model_input) == 2 * batch:
                tree = select_branch(tree, branches[k], batch)
            self._row(tree, branches[k], channels, sum(map(bool, draws[:k])))

        def rows(tree: Arguments) -> None:
            for k in range(len(branches)):
                row(tree, k)

        def warm_up(tree: Arguments) -> None:
            for kind in dict.fromkeys(branches):
                row(tree, branches.index(kind))

        def make(inputs: StaticInputs) -> Program:
            return self._program(inputs, rows, warm_up)

        key = ("loop", *branches, tuple(map(bool, draws)), channels)
        if not self._replay(key, arguments, make):
            rows(arguments)

    def _row(self, tree: Arguments, branches: str, channels: int, slot: int) -> None:
        """The body of a step: nothing in it may depend on the row, the schedule or a scale but through tensors."""
        args, kwargs = tree
        loop = self.loop
        output = self._denoiser(*args, **kwargs)[0][:, :channels]
        uncond, cond = output.chunk(2) if branches == "both" else (output, None)
        loop.advance(uncond, cond, loop.noise[slot] if slot < len(loop.noise) else None)

    def _replay(
        self,
        what: Hashable,
        arguments: Arguments,
        make: Callable[[StaticInputs], Program],
    ) -> bool:
        """False: nothing was run, `reason` says why."""
        workspace, loop = self._workspace, self.loop
        if workspace is None:
            return False
        if (problem := unhashable(arguments)) is not None:
            self.reason = f"{problem}: nobody can tell whether it changes"
            return False
        backend = os.environ.get("FASTGUARD_BACKEND")
        layout = signature(arguments, loop.tensors)
        key = (what, layout, self._print, self._capturing.options, backend)
        place = (workspace.key, what, layout)
        if (refusal := self._graphs.refusal(workspace, key) or self._moving(place)) is not None:
            self.reason = refusal
            return False

        def made() -> Program:
            return replace(make(StaticInputs(arguments, loop.x.device, loop.tensors)), watch=lambda: self._watch(place))

        program = self._graphs.program(workspace, key, made)
        program.inputs.load(arguments)
        failed = self._graphs.run(workspace, key, program)
        self.reason = failed or self.reason
        self.replayed += failed is None
        if failed is None:
            self._capturing.moves.pop(place, None)
        return True

    def _watch(self, place: Hashable) -> Callable[[], str | None]:
        """Begin to look at the model; what this gives says whether it is still the one that the key names, written to by nobody."""
        fingerprint, moves = self._capturing.fingerprint(), self._capturing.moves
        written, drawn = fingerprint.written(), [_drawn()]

        def moved() -> str | None:
            # Random numbers are looked at over the first run alone: a capture takes long, and other threads draw from these, too.
            same = fingerprint() == self._print and (not drawn or _drawn() == drawn.pop())
            pairs = zip(written, fingerprint.written(), strict=True)
            if same and all(tensor is other and count == again for (tensor, count), (other, again) in pairs):
                return None
            self._print = None  # taken again before the next row
            moves[place] = moves.get(place, 0) + 1
            return self._moving(place) or "the model's first forward changed it (it may have made itself ready)"

        return moved

    def _moving(self, place: Hashable) -> str | None:
        """Once may be what a model does in its first forward to make itself ready."""
        again = self._capturing.moves.get(place, 0) > 1
        return MOVES if again else None

    def _program(
        self,
        inputs: StaticInputs,
        body: Callable[[Arguments], None],
        warm_up: Callable[[Arguments], None] | None = None,
    ) -> Program:
        return Program(
            body=lambda: body(inputs.tree),
            warm_up=lambda: (warm_up or body)(inputs.tree),
            inputs=inputs,
            keeps=self.loop.changed,
            nbytes=inputs.nbytes,
        )


def _drawn() -> tuple[Any, ...]:
    """Where Python's and NumPy's global generators are."""
    numpy: Any = np.random.get_state()
    return random.getstate(), *(part.tobytes() if isinstance(part, np.ndarray) else part for part in numpy)
