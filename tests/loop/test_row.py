"""How far a row is from the stock loop to the op, and the op from its kernel: functions of ours that lie inside each other."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastguard
from fastguard.kernels import guided_step as op
from fastguard.kernels import triton_step
from fastguard.kernels.arguments import Operands
from tests import pipelines
from tests.kernels import cases

HOUSE = Path(fastguard.__file__).parent


def ours(frame) -> list[tuple[str, str]]:
    """(file, function) of the frames around this one as far as they are ours, the outermost first."""
    found = []
    while Path(frame.f_code.co_filename).is_relative_to(HOUSE):
        found.append((Path(frame.f_code.co_filename).stem, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def test_a_row_passes_five_functions_on_its_way_to_the_op(monkeypatch):
    """Beside the two of the shadow that stands in the denoiser's place."""
    rows, real = [], op.guided_step

    def noting(operands):
        rows.append(ours(sys._getframe(1)))
        real(operands)

    monkeypatch.setattr("fastguard.loop.loop.guided_step", noting)
    pipe = pipelines.sd(scheduler=pipelines.ddim())
    with fastguard.enable(pipe, "dtp", gate=0.02, capture="off"):
        pipe("a cat", num_inference_steps=3, output_type="latent")
    assert len(rows) == 3
    for row in rows:
        assert [file for file, _ in row][:2] == ["shadow", "shadow"]
        assert [name for _, name in row[2:]] == ["denoise", "run_row", "run", "body", "advance"]


def test_the_op_is_three_calls_from_its_kernel(monkeypatch):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append([name for _, name in ours(sys._getframe(1))])

    monkeypatch.setattr(triton_step, "_step_kernel", Kernel())
    case = cases.make(0, (2, 4, 8, 8), dtype=torch.float16)
    op.guided_step(Operands(case.uncond, case.cond, **case.arguments), "triton")
    assert launches == [["guided_step", "_run", "guided_step_triton"]], "the third calls kernel[grid]"
