"""The launcher's own Python: between the op's call and the kernels nothing waits, copies or launches. Kernels are stand-ins.

Fake tensors stop at the op, so what the launcher does on the host is watched here, on tensors of the host: every operation that is no
view would be a launch, a copy or a wait on a device.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import cases

pytest.importorskip("triton")

from fastguard.kernels import guided_step as op
from fastguard.kernels import triton_step
from fastguard.kernels.arguments import Operands
from fastguard.kernels.layout import State

SD, SDXL = (2, 4, 64, 64), (2, 4, 128, 128)


class Launched:
    """A kernel that only notes its launches."""

    def __init__(self, notes: list[str], name: str) -> None:
        self.notes, self.name = notes, name

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: self.notes.append(self.name)


class Watch(TorchDispatchMode):
    """Every operation that is no view."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.notes.append(str(function))
        return function(*args, **(kwargs or {}))


def launched(monkeypatch, shape, *, change=lambda case: None, **options) -> list[str]:
    """What one step does on its way to the device, in order."""
    case = cases.make(0, shape, dtype=torch.float16, **options)
    change(case)
    scratch = op.scratch_for(case.arguments["x"])
    notes: list[str] = []
    for name in ("_norm_kernel", "_step_kernel"):
        monkeypatch.setattr(triton_step, name, Launched(notes, name))
    with Watch(notes):
        op._run(Operands(case.uncond, case.cond, **case.arguments, scratch=scratch), "triton")
    return notes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"anchored": True, "combined": torch.float16},
        {"both": False},
        {"noise": torch.float16},
        {"halves": 1, "slots": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "kernels"), [(SD, ["_step_kernel"]), (SDXL, ["_norm_kernel", "_step_kernel"])], ids=["SD", "SDXL"]
)
def test_nothing_but_the_kernels(shape, kernels, options, monkeypatch):
    assert launched(monkeypatch, shape, **options) == kernels


def arguments_of_a_launch(monkeypatch, rows=3):
    """What the kernels are handed in one row after the other: tensors by their place, everything else by value."""
    case = cases.make(0, SD, dtype=torch.float16)
    operands = Operands(case.uncond, case.cond, **case.arguments, scratch=op.scratch_for(case.arguments["x"]))
    seen: list[list] = []

    class Handed:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                values = [*args, *sorted(kwargs.items())]
                seen.append([grid, *(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values)])

            return launch

    monkeypatch.setattr(triton_step, "_step_kernel", Handed())
    for row in range(rows):
        operands.state[:, State.STEP] = row  # as the kernel itself would have left it
        op._run(operands, "triton")
    return seen


def test_a_launch_says_nothing_of_the_row(monkeypatch):
    """A graph bakes in what a kernel is handed by value; a counter of Python's would stand still in every replay."""
    first, *others = arguments_of_a_launch(monkeypatch)
    assert others == [first, first]


def test_a_planted_counter_in_the_launcher_is_found(monkeypatch):
    real, calls = triton_step.guided_step_triton, []

    def counting(operands):
        calls.append(None)
        real(operands._replace(x=operands.x[: len(calls)]))

    monkeypatch.setattr(triton_step, "guided_step_triton", counting)
    first, *others = arguments_of_a_launch(monkeypatch, rows=2)
    assert others != [first]


def _waits(operands):
    operands.state[0, 0].item()


def _launches(operands):
    operands.x.mul_(1.0)


def _copies(operands):
    operands.state.copy_(torch.zeros(operands.state.shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("plant", "seen"), [(_waits, "aten._local_scalar_dense"), (_launches, "aten.mul_"), (_copies, "aten.copy_")]
)
def test_planted_faults_in_the_launcher_are_found(plant, seen, monkeypatch):
    real = triton_step.guided_step_triton

    def faulty(operands):
        plant(operands)
        real(operands)

    monkeypatch.setattr(triton_step, "guided_step_triton", faulty)
    notes = launched(monkeypatch, SD)
    assert any(note.startswith(seen) for note in notes)
    assert notes[-1] == "_step_kernel"


def test_outputs_in_another_memory_format_are_copied():
    """Not free, and said so in docs/proof.md: a channels-last denoiser on contiguous latents costs a copy for each branch."""

    def channels_last(case):
        case.uncond = case.uncond.contiguous(memory_format=torch.channels_last)
        case.cond = case.cond.contiguous(memory_format=torch.channels_last)

    with pytest.MonkeyPatch.context() as patch:
        notes = launched(patch, SD, change=channels_last)
    assert notes[-1] == "_step_kernel"
    assert sum(note.startswith(("aten.clone", "aten.copy_", "aten._to_copy")) for note in notes) == 2
