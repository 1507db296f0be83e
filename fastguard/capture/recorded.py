"""What a guarded call runs as a graph: one row of its loop, or the whole generation. The other half of `fastguard.pipelines.call`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastguard.capture.graphed import Arguments

if TYPE_CHECKING:
    from fastguard.pipelines.call import Call


def needs_steps(call: Call) -> str | None:
    """Why the stock loop must go through its rows one by one."""
    if call.family.name != "text-to-image":
        return "only Stable Diffusion and SDXL text-to-image run as a whole"
    if call.observed:
        return "a callback looks at every step"
    if call.arguments.get("denoising_end") is not None:
        return "denoising_end ends the loop early"
    schedule = call.compiled(call.scheduler.timesteps[0])
    return None if schedule.linear else schedule.reason


def run(call: Call, arguments: Arguments, sample: torch.Tensor, branches: str, batch: int) -> bool:
    """Run denoiser and fused op of this row, or of all, in `call.graphed`; False if they are left to the call."""
    if call.graphed.whole:
        _run_whole(call, arguments)
        return True
    return _run_row(call, arguments, sample, branches, batch)


def _run_row(call: Call, arguments: Arguments, sample: torch.Tensor, branches: str, batch: int) -> bool:
    loop = call.graphed.loop
    if (problem := _needs_its_output(call, arguments)) is not None:
        call.graphed.reason = problem
        return False
    if call.observed and call.schedule.linear:
        seen = sample if call.seen is None else call.seen
        loop.load_latents(seen[:batch, : loop.x.shape[1]])
    noise = call.noise.of_row(call.schedule, call.row, loop.x, loop.dtype, call.generator)
    if noise is not None:
        loop.noise[0].copy_(noise)
    if call.graphed.step(arguments, branches, channels=loop.x.shape[1], observed=call.observed):
        call.rows_run += 2 if branches == "both" else 1
        return True
    call.noise.put_back(noise)
    return False


def _needs_its_output(call: Call, arguments: Arguments) -> str | None:
    """Why the denoiser's output, which a graph keeps to itself, is needed outside it."""
    if call.guidance.rescale > 0.0:
        return "guidance_rescale reads the conditional output, which stays inside a graph"
    if arguments[1].get("return_dict") is not False:
        return "the pipeline asks its denoiser for an output by name (return_dict), and a graph gives none"
    return None


def _run_whole(call: Call, arguments: Arguments) -> None:
    loop = call.graphed.loop
    rows = len(call.schedule.timesteps)
    guided = len(loop.model_input) == 2 * len(loop.x)
    branches = call.guidance.plan.branches if guided else ("cond",) * rows
    slots = iter(loop.noise)
    for row in range(rows):
        if (noise := call.noise.of_row(call.schedule, row, loop.x, loop.dtype, call.generator)) is not None:
            next(slots).copy_(noise)
    args, kwargs = arguments
    if "timestep" in kwargs:
        kwargs = {**kwargs, "timestep": loop.timestep}
    else:
        args = (args[0], loop.timestep, *args[2:])
    call.graphed.generation((args, kwargs), branches, call.schedule.draws, channels=loop.x.shape[1])
    call.rows_run += sum(2 if branch == "both" else 1 for branch in branches)
