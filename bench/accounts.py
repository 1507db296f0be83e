"""Launches and bytes of a denoising step outside the denoiser, from the operations that really run (no GPU takes part).

A step is what lies between two denoiser calls: guidance, scheduler, the next model input. Stock loops run on labelled tensors,
guarded ones on fake ones (`fastguard.syncs.probe`); a launch is an operation on the device that is neither a view, an allocation nor a
copy between host and device, and its bytes are those of its arguments and results, each counted once.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

import fastguard
from fastguard import Policy
from fastguard.kernels.layout import HISTORY, Row, Rule, State
from fastguard.kernels.triton_step import launch_shape
from fastguard.schedules.compiler import compile_schedule
from fastguard.schedules.schedule import Schedule
from fastguard.syncs import probe
from fastguard.syncs.pretend import Pretend
from fastguard.syncs.stream import Op, Stream

STEPS = 14
EDGE = 4  # rows left out at either end: schedulers start and end with lower orders
PERIOD = 6  # rows are averaged over whole periods: mid-stages alternate by two or three
FUSED = "fastguard.guided_step.default"
NUMBERS = 64  # bytes: an operation that moves no more works on single numbers


@dataclass(frozen=True)
class Account:
    """Means per step. launches include `numbers`, those on single numbers; waits are synchronisations and copies."""

    launches: float
    numbers: float
    moved: float
    waits: float


def stock(pipe: Any) -> Account:
    """A step of the stock loop."""
    stream = _run(pipe, values=True)
    rows = _rows(stream)
    ops = [op for op in stream.ops if op.row in rows and not op.denoiser]
    return _account(ops, len(rows), [op.moved for op in ops])


def composition(pipe: Any) -> dict[str, int]:
    """Launches on latents in a late step of the stock loop (the scheduler has its full order), by where they come from."""
    stream = _run(pipe, values=True)
    kind: Any = type(pipe.scheduler)
    code, first = inspect.getsourcelines(kind.scale_model_input)
    scaling = range(first, first + len(code))
    found = dict.fromkeys(("cat", "guidance", "scale_model_input", "scheduler"), 0)
    for op in stream.ops:
        if op.row == _rows(stream)[-1] and not op.denoiser and op.launch and op.moved > NUMBERS:
            source = (
                "guidance" if "/pipelines/" in op.where[0] else "scheduler"
            )  # a scheduler's noise is drawn elsewhere
            if "cat" in op.name:
                source = "cat"
            elif source == "scheduler" and op.where[1] in scaling:
                source = "scale_model_input"
            found[source] += 1
    return found


def guarded(pipe: Any, policy: str | Policy = "og+dtp") -> Account:
    """A step of the guarded loop; the fused op at the number of launches that its launcher makes, and at its bytes on paper."""
    with fastguard.enable(pipe, policy, gate=0.02):
        stream = _run(pipe, values=False)
    rows = _rows(stream)
    ops = [op for op in stream.ops if op.row in rows and not op.denoiser]
    schedule = table(pipe.scheduler)
    size = pipe.unet.config.sample_size
    elements = pipe.unet.config.in_channels * size * size
    moved = [
        fused_bytes(schedule, op.row - 1, elements, pipe.unet.dtype) if op.name == FUSED else op.moved for op in ops
    ]
    account = _account(ops, len(rows), moved)
    second = launches(elements) - 1
    fused = sum(op.name == FUSED for op in ops) / len(rows)
    return Account(account.launches + second * fused, account.numbers, account.moved, account.waits)


def launches(elements: int) -> int:
    """Kernels that the fused op launches for latents of `elements` numbers."""
    return 1 if launch_shape(elements)[1] == 1 else 2


def fused_bytes(schedule: Schedule, row: int, elements: int, dtype: torch.dtype) -> int:
    """Bytes per image that the fused op moves at a row: u and c twice (for the norm and for the step), x both ways, what the
    row's coefficients need of history and noise, m where it is stored, both halves of the next model input, and the tables."""
    c = schedule.rows[row]
    full, narrow = 4 * elements, dtype.itemsize * elements
    history = sum(bool(c[Row.H0 + slot]) for slot in range(HISTORY))
    latents = 2 * full + history * full + (full if c[Row.STORE] >= 0 else 0)
    outputs = 2 * 2 * narrow + 2 * narrow
    noise = narrow if c[Row.N] else 0
    tables = 8 * (2 * len(State) + 2 * len(Row) + len(Rule)) + 4 + 4
    return latents + outputs + noise + tables


def table(scheduler: Any, steps: int = STEPS) -> Schedule:
    scheduler.set_timesteps(steps)
    return compile_schedule(scheduler)


def eager_guard() -> int:
    """Launches that a per-sample transition rule adds to a stock step when it is written in plain torch, without synchronising."""
    stream = Stream()
    with Pretend(stream, values=False), torch.no_grad():
        u, c = torch.empty(2, 8, 4, 64, 64, device="cuda", dtype=torch.float16).unbind()
        d_1, d_2, before, after = torch.empty(4, 8, device="cuda").unbind()
        fired = torch.empty(8, device="cuda", dtype=torch.bool)
        delta = c - u  # stock computes it, too
        stream.open = True
        d = delta.float().square().sum(dim=(1, 2, 3))
        fired |= (d_1 < d_2) & (d_1 < d)
        torch.where(fired, after, before)
    return sum(op.launch for op in stream.ops)


def _run(pipe: Any, *, values: bool) -> Stream:
    arguments = {**probe.example_arguments(pipe), "num_inference_steps": STEPS, "output_type": "latent"}
    stream, broke_off = probe.run(pipe, arguments, values=values)
    if broke_off is not None:
        raise RuntimeError(f"{type(pipe.scheduler).__name__}: {broke_off}")
    return stream


def _rows(stream: Stream) -> range:
    """What followed the denoiser calls in the middle of the loop."""
    return range(EDGE, EDGE + (stream.row - 2 * EDGE) // PERIOD * PERIOD)


def _account(ops: list[Op], steps: int, moved: list[int]) -> Account:
    run = [op for op in ops if op.launch]
    return Account(
        launches=len(run) / steps,
        numbers=sum(op.moved <= NUMBERS for op in run) / steps,
        moved=sum(moved) / steps,
        waits=sum(op.sync is not None for op in ops) / steps,
    )


def single_launch() -> int:
    """The most elements per image for which the fused op takes one launch."""
    return max(2**power for power in range(30) if launches(2**power) == 1)
