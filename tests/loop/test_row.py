"""How far a row is from the stock loop to the op, and the op from its kernel: functions of ours that lie inside each other."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastguard
from fastguard.kernels import guided_step as op
from fastguard.kernels import triton_step
from fastguard.kernels.arguments import Operands
from fastguard.pipelines.call import Call
from fastguard.pipelines.own_combination import OwnCombination
from tests import pipelines
from tests.families.every import EVERY
from tests.kernels import cases

HOUSE = Path(fastguard.__file__).parent


def ours(frame) -> list[tuple[str, str]]:
    """(file, function) of the frames around this one as far as they are ours, the outermost first."""
    found = []
    while Path(frame.f_code.co_filename).is_relative_to(HOUSE):
        found.append((Path(frame.f_code.co_filename).stem, frame.f_code.co_name))
        frame = frame.f_back
    return found[::-1]


def test_a_row_passes_four_functions_on_its_way_to_the_op(monkeypatch):
    rows, real = [], op.guided_step

    def noting(operands):
        rows.append([name for _, name in ours(sys._getframe(1))])
        real(operands)

    monkeypatch.setattr("fastguard.loop.loop.guided_step", noting)
    pipe = pipelines.sd(scheduler=pipelines.ddim())
    with fastguard.enable(pipe, "dtp", gate=0.02, capture="off"):
        pipe("a cat", num_inference_steps=3, output_type="latent")
    assert rows == [["denoise", "run_row", "run_body", "advance"]] * 3


def calls_by_row(pipe, policy, step, **arguments) -> list[Counter]:
    """The functions of ours, but for the op's, that are called from one step of the scheduler to the next."""
    rows, now = [], Counter()

    def note(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(HOUSE) and "kernels" not in file.parts:
            now[frame.f_code.co_name] += 1
        if event == "return" and frame.f_code is step.__code__:
            rows.append(now.copy())
            now.clear()

    with fastguard.enable(pipe, policy, capture="off"):
        sys.setprofile(note)
        try:
            pipe(num_inference_steps=4, output_type="latent", **arguments)
        finally:
            sys.setprofile(None)
    return rows


def test_an_eager_row_calls_seven_functions_beside_the_op():
    """What is fixed for a call is asked when its loop begins, and no property or stand-in runs Python."""
    pipe = pipelines.sd(scheduler=pipelines.ddim())
    policy = fastguard.policy("dtp", gate=0.02)
    first, *others = calls_by_row(pipe, policy, Call.step, prompt="a cat")
    names = ("scale_model_input", "denoise", "guidance", "run_row", "run_body", "advance", "step")
    assert others == [Counter(names)] * 3
    assert sum(first.values()) > 100, "the tables are made there"


@pytest.mark.parametrize(("name", "functions"), [("sana", 11), ("flux", 14)])
def test_an_eager_row_of_the_second_kind_calls_few(name, functions):
    """One call of the denoiser, or two: collected, cut to the step's space, guided; Flux sets an attribute in every row."""
    pipe, arguments = EVERY[name].make(), EVERY[name].guided()
    of_the_row = {key: value for key, value in arguments.items() if key not in ("num_inference_steps", "output_type")}
    with torch.no_grad():
        rows = calls_by_row(pipe, fastguard.policy("paper-dtp", gate=0.02), OwnCombination.step, **of_the_row)
    # One of them is a comprehension, which is no function from Python 3.12 on.
    assert {sum(row.values()) for row in rows[1:]} <= {functions - 1, functions}


def test_the_op_is_three_calls_from_its_kernel(monkeypatch):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append([name for _, name in ours(sys._getframe(1))])

    monkeypatch.setattr(triton_step, "_step_kernel", Kernel())
    case = cases.make(0, (2, 4, 8, 8), dtype=torch.float16)
    op.guided_step(Operands(case.uncond, case.cond, **case.arguments), "triton")
    assert launches == [["guided_step", "_run", "guided_step_triton"]], "the third calls kernel[grid]"
