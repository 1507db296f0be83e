"""One generation: a schedule, the plan of its images, the buffers they lie in, and the body of its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastguard.capture.runner import Arguments, Body, BodyRunner
from fastguard.kernels.layout import Row
from fastguard.loop.loop import Loop, LoopShape
from fastguard.loop.noise import Noise
from fastguard.pipelines.outputs import select_branch, split
from fastguard.policies.plan import Plan
from fastguard.schedules.schedule import Schedule


class Generation:
    """What lies fixed once a loop has begun, and how far it is.

    row       rows that have run; rows_run: denoiser rows per image they took
    whole     the first row runs all of them, as one graph; the pipeline passes through the others
    """

    def __init__(
        self,
        schedule: Schedule,
        plan: Plan,
        latents: torch.Tensor,
        denoiser: Callable[..., Any],
        runner: BodyRunner,
        *,
        halves: int,
        whole: bool,
    ) -> None:
        self.schedule, self.denoiser, self.runner = schedule, denoiser, runner
        shape = LoopShape.of(schedule, plan, latents, halves=halves, draws=len(schedule.draws) if whole else 1)

        def make() -> Loop:
            return Loop(schedule, plan, latents, shape)

        leased = runner.lease(shape, latents, make, positions=halves * latents[:, 0].numel())
        self.loop: Loop = make() if leased is None else leased
        self.whole = whole and leased is not None
        if leased is not None:
            leased.load(schedule, plan, latents)
        self.noise = Noise()
        self.row = self.rows_run = 0

    @property
    def over(self) -> bool:
        """All rows have run."""
        return self.row == len(self.schedule.timesteps)

    def run_row(
        self, arguments: Arguments, branches: str, generator: Any, *, look_again: bool, keeps_cond: bool = False
    ) -> torch.Tensor | None:
        """The next row. `arguments` are the denoiser's, of the branches to run.

        keeps_cond: return the conditional output, which a graph would keep to itself: such a row is never one.
        """
        self._draw(self.row, 0, generator)
        seen: list[torch.Tensor | None] | None = [] if keeps_cond else None
        body = row_body(self.denoiser, self.loop, branches, 0, seen)
        if keeps_cond:
            self.runner.reason = "guidance_rescale reads the conditional output, which stays inside a graph"
            body(arguments)
        else:
            self.runner.run(("step", branches, self.loop.x.shape[1]), body, arguments, look_again=look_again)
        self._count(branches)
        return seen[0] if seen else None

    def run_all(self, arguments: Arguments, plan: tuple[str, ...], generator: Any) -> None:
        """All rows in one launch. `plan`: the branches of each row; `arguments` hold those of the whole batch."""
        loop, draws = self.loop, [bool(n) for n in self.schedule.draws]
        batch, cut = len(loop.x), len(loop.model_input) == 2 * len(loop.x)
        args, kwargs = arguments
        if "timestep" in kwargs:
            kwargs = {**kwargs, "timestep": loop.timestep}
        else:
            args = (args[0], loop.timestep, *args[2:])
        bodies: list[Body] = []
        for k, branches in enumerate(plan):
            slot = sum(draws[:k])
            self._draw(k, slot, generator)
            body = row_body(self.denoiser, loop, branches, slot)
            bodies.append(_on_branch(body, branches, batch) if cut and branches != "both" else body)

        def generation(tree: Arguments) -> None:
            for body in bodies:
                body(tree)

        def one_of_each(tree: Arguments) -> None:
            for branches in dict.fromkeys(plan):
                bodies[plan.index(branches)](tree)

        self.runner.run(("loop", *plan, tuple(draws), loop.x.shape[1]), generation, (args, kwargs), warm_up=one_of_each)
        for branches in plan:
            self._count(branches)

    def _draw(self, row: int, slot: int, generator: Any) -> None:
        """The noise that stock's step() of a row would draw, to where the row's body reads it."""
        noise = self.noise.of_row(self.schedule, row, self.loop.x, self.loop.dtype, generator)
        if noise is not None:
            self.loop.noise[slot].copy_(noise)

    def _count(self, branches: str) -> None:
        self.row += 1
        self.rows_run += 2 if branches == "both" else 1

    def take(self, shown: torch.Tensor, halves: int) -> None:
        """Begin the next row from the latents that the pipeline shows `halves` times: its first, or what somebody made of the last.

        ValueError if they are not of the loop's shape any more: what is known of an image lies in its place in the batch.
        """
        x = self.loop.x
        if shown.shape != (halves * len(x), *x.shape[1:]):
            raise ValueError(
                f"latents became {[len(shown) // halves, *shown.shape[1:]]} in a guarded call that began with {list(x.shape)} (a callback changed their "
                f"size or dropped an image): the guard keeps state per image and cannot follow; disable it for such a call"
            )
        self.loop.load_latents(shown[: len(x)])

    def model_input(self, shown: torch.Tensor) -> torch.Tensor:
        """The denoiser input of the next row, in the loop's buffer if it is of its shape; `shown` is what the pipeline would scale."""
        scale = float(self.schedule.rows[self.row, Row.S])
        ready = self.loop.model_input
        if shown.shape != ready.shape or shown.dtype != ready.dtype:
            return shown if scale == 1.0 else shown * scale
        return ready.copy_(shown) if scale == 1.0 else torch.mul(shown, scale, out=ready)


def row_body(
    denoiser: Callable[..., Any], loop: Loop, branches: str, slot: int, seen: list[torch.Tensor | None] | None = None
) -> Body:
    """One row, run eagerly or recorded: nothing in it may depend on the row, the schedule or a scale but through tensors.

    A model may predict more than the latents' channels (a variance), which are not guided. seen: gets the conditional output.
    """
    channels = loop.x.shape[1]

    def body(arguments: Arguments) -> None:
        args, kwargs = arguments
        uncond, cond = split(denoiser(*args, **kwargs)[0][:, :channels], branches)
        loop.advance(uncond, cond, loop.noise[slot] if slot < len(loop.noise) else None)
        if seen is not None:
            seen.append(cond)

    return body


def _on_branch(body: Body, branches: str, batch: int) -> Body:
    return lambda arguments: body(select_branch(arguments, branches, batch))
