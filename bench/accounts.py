"""Launches and bytes of a denoising step outside the denoiser, from the operations that really run (no GPU takes part).

A step is what lies between two denoiser calls: guidance, scheduler, the next model input. The loops run on labelled tensors
(`fastguard.syncs.probe`); a launch is an operation on the device that is neither a view, an allocation nor a copy between host and
device, and its bytes are those of its arguments and results, each counted once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fastguard
from fastguard import Policy
from fastguard.capture.static_inputs import tensors_of
from fastguard.kernels.layout import HISTORY, Row, Rule, State
from fastguard.kernels.triton_step import launch_shape
from fastguard.schedules.compiler import compile_schedule
from fastguard.schedules.schedule import Schedule
from fastguard.syncs import probe
from fastguard.syncs.pretend import Pretend
from fastguard.syncs.stream import WAIT, Stream, classify, innermost_line

STEPS = 14
EDGE = 4  # rows left out at either end: schedulers start and end with lower orders
PERIOD = 6  # rows are averaged over whole periods: mid-stages alternate by two or three
FUSED = "fastguard.guided_step.default"
NUMBERS = 64  # bytes: an operation that moves no more works on single numbers
_MEMORY_ONLY = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("detach", "lift_fresh", "alias", "_unsafe_view", "_reshape_alias", "set_", "resize_"),
}
_NOT_READ = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_"}  # what they change they do not read


@dataclass(frozen=True)
class Launch:
    """An operation that launches a kernel. moved: bytes of device memory read and written, each tensor once."""

    name: str
    row: int
    moved: int
    where: tuple[str, int]


@dataclass
class Ledger(Stream):
    """Notes the launches beside the denoiser, too."""

    launches: list[Launch] = field(default_factory=list)

    def after(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not self.open or self.denoiser or not _launches(func, args, kwargs, result):
            return
        self.launches.append(Launch(str(func), self.row, traffic(func, args, kwargs, result), innermost_line(__file__)))


def _launches(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether an operation launches a kernel: it is on the device, and neither a view, nor an allocation, nor a copy from or to it."""
    name = func.__name__.split(".")[0]
    results = tensors_of(result)
    if func.is_view or name in _MEMORY_ONLY or name == "_local_scalar_dense":
        return False
    if not any(tensor.is_cuda for tensor in (*results, *tensors_of((args, kwargs)))):
        return False
    copies = classify(func, args, kwargs)
    return (copies is None or copies[0] == WAIT) and (bool(results) or func._schema.is_mutable)


def traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes of device memory that the operation's arguments and results occupy: what it reads and writes at least."""
    name = func.__name__.split(".")[0]
    read: dict[int, torch.Tensor] = {}
    written: dict[int, torch.Tensor] = {id(tensor): tensor for tensor in tensors_of(result)}
    for argument, value in _named(func, args, kwargs):
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors_of(value):
            if mutated:
                written[id(tensor)] = tensor
            if not mutated or name not in _NOT_READ:
                read[id(tensor)] = tensor
    return sum(_bytes(tensor) for tensor in (*read.values(), *written.values()) if tensor.is_cuda)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _bytes(tensor: torch.Tensor) -> int:
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * tensor.element_size()


@dataclass(frozen=True)
class Account:
    """Means per step. launches include `numbers`, those on single numbers; waits are synchronisations and copies."""

    launches: float
    numbers: float
    moved: float
    waits: float


def stock(pipe: Any) -> Account:
    """A step of the stock loop."""
    return _account(_run(pipe))


def composition(pipe: Any) -> dict[str, int]:
    """Launches on latents in a late step of the stock loop (the scheduler has its full order), by where they come from."""
    ledger = _run(pipe)
    kind: Any = type(pipe.scheduler)
    code, first = inspect.getsourcelines(kind.scale_model_input)
    scaling = range(first, first + len(code))
    found = dict.fromkeys(("cat", "guidance", "scale_model_input", "scheduler"), 0)
    for op in ledger.launches:
        if op.row == _rows(ledger)[-1] and op.moved > NUMBERS:
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
    with fastguard.enable(pipe, policy, gate=0.02) as guard:
        ledger = _run(pipe)
        anchored = bool(guard.policy.anchored)
    schedule = table(pipe.scheduler)
    size = pipe.unet.config.sample_size
    elements = pipe.unet.config.in_channels * size * size
    ledger.launches = [
        replace(op, moved=fused_bytes(schedule, op.row - 1, elements, pipe.unet.dtype, anchored))
        if op.name == FUSED
        else op
        for op in ledger.launches
    ]
    account, rows = _account(ledger), _rows(ledger)
    second = launches(elements) - 1
    fused = sum(op.name == FUSED and op.row in rows for op in ledger.launches) / len(rows)
    return replace(account, launches=account.launches + second * fused)


def launches(elements: int) -> int:
    """Kernels that the fused op launches for latents of `elements` numbers."""
    return 1 if launch_shape(elements)[1] == 1 else 2


def fused_bytes(schedule: Schedule, row: int, elements: int, dtype: torch.dtype, anchored: bool = False) -> int:
    """Bytes per image that the fused op moves at a row: u and c twice (for the sums and for the step), x both ways, what the
    row's coefficients need of history and noise, m where it is stored, both halves of the next model input, and the tables.

    anchored, after the first row: x and the anchor for the sums, the anchor's first half once more for the step, and the share."""
    c = schedule.rows[row]
    full, narrow = 4 * elements, dtype.itemsize * elements
    history = sum(bool(c[Row.H0 + slot]) for slot in range(HISTORY))
    latents = 2 * full + history * full + (full if c[Row.STORE] >= 0 else 0)
    outputs = 2 * 2 * narrow + 2 * narrow
    noise = narrow if c[Row.N] else 0
    tables = 8 * (2 * len(State) + 2 * len(Row) + len(Rule)) + 4 + 4
    anchor = 4 * full + 4 if anchored else 0
    return latents + outputs + noise + tables + anchor


def table(scheduler: Any, steps: int = STEPS) -> Schedule:
    scheduler.set_timesteps(steps)
    return compile_schedule(scheduler)


def eager_guard() -> int:
    """Launches that a per-sample transition rule adds to a stock step when it is written in plain torch, without synchronising."""
    ledger = Ledger()
    with Pretend(ledger), torch.no_grad():
        u, c = torch.empty(2, 8, 4, 64, 64, device="cuda", dtype=torch.float16).unbind()
        d_1, d_2, before, after = torch.empty(4, 8, device="cuda").unbind()
        fired = torch.empty(8, device="cuda", dtype=torch.bool)
        delta = c - u  # stock computes it, too
        ledger.open = True
        d = delta.float().square().sum(dim=(1, 2, 3))
        fired |= (d_1 < d_2) & (d_1 < d)
        torch.where(fired, after, before)
    return len(ledger.launches)


def _run(pipe: Any) -> Ledger:
    arguments = {**probe.example_arguments(pipe), "num_inference_steps": STEPS, "output_type": "latent"}
    ledger = Ledger()
    probe.run(pipe, arguments, ledger)
    if ledger.broke_off is not None:
        raise RuntimeError(f"{type(pipe.scheduler).__name__}: {ledger.broke_off}")
    return ledger


def _rows(stream: Stream) -> range:
    """What followed the denoiser calls in the middle of the loop."""
    return range(EDGE, EDGE + (stream.row - 2 * EDGE) // PERIOD * PERIOD)


def _account(ledger: Ledger) -> Account:
    rows = _rows(ledger)
    run = [op for op in ledger.launches if op.row in rows]
    return Account(
        launches=len(run) / len(rows),
        numbers=sum(op.moved <= NUMBERS for op in run) / len(rows),
        moved=sum(op.moved for op in run) / len(rows),
        waits=sum(op.row in rows and not op.denoiser for op in ledger.ops) / len(rows),
    )


def single_launch() -> int:
    """The most elements per image for which the fused op takes one launch."""
    return max(2**power for power in range(30) if launches(2**power) == 1)
