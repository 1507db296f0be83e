"""One generation of the fused kind: the guidance of its images, the buffers they lie in, and the body of its rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastguard.capture.runner import Arguments, BodyRunner
from fastguard.kernels.layout import Row
from fastguard.loop.guide import Guide
from fastguard.loop.loop import Loop, LoopShape
from fastguard.loop.noise import Noise
from fastguard.pipelines.attached import check_shape
from fastguard.pipelines.outputs import select_branch
from fastguard.policies.policy import Policy
from fastguard.schedules.schedule import Schedule


class Generation(Guide):
    """A `Guide` whose op makes the scheduler's update, too, and which runs the denoiser itself.

    generator  by which stock's step() draws; halves: 2 where the denoiser is given both branches, else 1
    look_again somebody may have changed the model since the last row
    recorded   rows may be graphs
    whole      the first row runs all of them, as one graph; the pipeline passes through the others
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        schedule: Schedule,
        runner: BodyRunner,
        *,
        guidance_scale: float,
        latents: torch.Tensor,
        generator: Any,
        halves: int,
        look_again: bool,
        whole: bool,
    ) -> None:
        self.runner, self.generator = runner, generator
        self.halves, self.look_again, self.whole = halves, look_again, whole
        self.noise = Noise()
        super().__init__(policies, schedule, guidance_scale=guidance_scale, latents=latents)

    def _loop_of(self, latents: torch.Tensor) -> Loop:
        draws = len(self.schedule.draws) if self.whole else 1
        shape = LoopShape.of(self.schedule, self.plan, latents, halves=self.halves, draws=draws)
        make = partial(Loop, self.schedule, self.plan, latents, shape)
        leased = self.runner.lease(shape, latents, make, positions=self.halves * latents[:, 0].numel())
        self.recorded = leased is not None
        self.whole = self.whole and self.recorded
        if leased is None:
            return make()
        leased.load(self.schedule, self.plan, latents)
        return leased

    def run_row(self, arguments: Arguments, plan: tuple[str, ...], *, cut: bool, keeps_cond: bool) -> Any:
        """The next row, or all of them. `arguments` are the denoiser's, plan: the branches of every row, which are to be `cut` out of them.

        keeps_cond: return the conditional output [B, ...], which a graph would keep to itself: such a row is never one.
        """
        if self.whole:
            self.run_all(arguments, plan, cut)
            return None
        branches, cond = plan[self.row], None
        if self.schedule.draws[self.row]:
            self._draw(self.row, 0)
        body: Any = partial(run_body, self.runner.denoiser, self.loop, branches, 0, cut)
        if keeps_cond or not self.recorded:
            cond = body(arguments)
            if self.recorded:
                self.runner.reason = "guidance_rescale reads the conditional output, which stays inside a graph"
        else:
            self.runner.run(("step", branches, self.loop.x.shape[1]), body, arguments, look_again=self.look_again)
        self.row += 1
        self.rows_run += 2 if branches == "both" else 1
        return cond

    def run_all(self, arguments: Arguments, plan: tuple[str, ...], cut: bool) -> None:
        """All rows in one launch."""
        loop, draws = self.loop, [bool(n) for n in self.schedule.draws]
        args, kwargs = arguments
        if "timestep" in kwargs:
            kwargs = {**kwargs, "timestep": loop.timestep}
        else:
            args = (args[0], loop.timestep, *args[2:])
        bodies: list[Any] = []
        for k, branches in enumerate(plan):
            slot = sum(draws[:k])
            if draws[k]:
                self._draw(k, slot)
            bodies.append(partial(run_body, self.runner.denoiser, loop, branches, slot, cut))

        def generation(tree: Arguments) -> None:
            for body in bodies:
                body(tree)

        def one_of_each(tree: Arguments) -> None:
            for branches in dict.fromkeys(plan):
                bodies[plan.index(branches)](tree)

        self.runner.run(("loop", *plan, tuple(draws), loop.x.shape[1]), generation, (args, kwargs), warm_up=one_of_each)
        self.row = len(plan)
        self.rows_run = sum(2 if branches == "both" else 1 for branches in plan)

    def _draw(self, row: int, slot: int) -> None:
        """The noise that stock's step() of a row would draw, to where the row's body reads it."""
        noise: Any = self.noise.of_row(self.schedule, row, self.loop.x, self.loop.dtype, self.generator)
        self.loop.noise[slot].copy_(noise)

    def take(self, shown: torch.Tensor, halves: int) -> None:
        """Begin the next row from the latents that the pipeline shows `halves` times: its first, or what somebody made of the last."""
        x = self.loop.x
        check_shape([len(shown) // halves, *shown.shape[1:]], list(x.shape))
        self.loop.load_latents(shown[: len(x)])

    def model_input(self, shown: torch.Tensor) -> torch.Tensor:
        """The denoiser input of the next row, in the loop's buffer if it is of its shape; `shown` is what the pipeline would scale."""
        scale = float(self.schedule.rows[self.row, Row.S])
        ready = self.loop.model_input
        if shown.shape != ready.shape or shown.dtype != ready.dtype:
            return shown if scale == 1.0 else shown * scale
        return ready.copy_(shown) if scale == 1.0 else torch.mul(shown, scale, out=ready)


def run_body(
    denoiser: Callable[..., Any], loop: Loop, branches: str, slot: int, cut: bool, arguments: Arguments
) -> torch.Tensor | None:
    """One row, run eagerly or recorded: nothing in it may depend on the row, the schedule or a scale but through tensors.

    cut: the arguments are those of both branches. A model may predict more than the latents' channels (a variance), which are not
    guided. Gives the conditional output.
    """
    if cut and branches != "both":
        arguments = select_branch(arguments, branches, len(loop.x))
    args, kwargs = arguments
    output = denoiser(*args, **kwargs)[0][:, : loop.x.shape[1]]
    uncond, cond = output.chunk(2) if branches == "both" else (output, None)
    loop.advance(uncond, cond, loop.noise[slot] if slot < len(loop.noise) else None)
    return cond
