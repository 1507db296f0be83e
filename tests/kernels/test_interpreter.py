"""The Triton kernels in Triton's interpreter, on the CPU, against the float64 reference.

TRITON_INTERPRET must be set before triton is imported, so pytest runs this file once more in a process of its own.
"""

import os
import subprocess
import sys

import pytest
import torch

from . import cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")

if not INTERPRETED:

    def test_kernels_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        print(run.stdout[-4000:])
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]

else:
    from fastguard.kernels import guided_step as kernel

    def run_and_check(shape, seed, **options):
        case = cases.make(seed, shape, **options)
        run = case.clone()
        run.run(backend="triton")
        cases.check(case, run, interpreted=True)

    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 4, 3, 5), (4, 4, 32, 32), (2, 4, 3, 8, 8)])
    def test_one_launch(shape):
        for seed in range(4):
            run_and_check(shape, seed, slots=seed)

    @pytest.mark.parametrize("shape", [(3, 4, 67, 65), (2, 4, 96, 96)])
    def test_two_launches(shape):
        assert shape[1] * shape[2] * shape[3] > kernel.SINGLE
        for seed in range(3):
            run_and_check(shape, seed)
