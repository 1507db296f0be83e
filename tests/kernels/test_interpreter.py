"""The Triton kernels in Triton's interpreter, on the CPU, against the float64 reference."""

import math
import warnings

import pytest
import torch

from . import batches, cases, interpreted

pytest.importorskip("triton")

pytestmark = pytest.mark.slow

if not interpreted.HERE:

    def test_kernels_in_the_interpreter():
        interpreted.run_file(__file__)

else:
    from fastguard.kernels import triton_step as kernel

    from . import test_decisions_of_the_op as decisions

    ONE_LAUNCH = (5, 4, 3, 5)
    TWO_LAUNCHES = (3, 4, 67, 65)

    @pytest.fixture(params=[1, 2])
    def launches(request, monkeypatch):
        """Both launch schemes, on latents small enough for the interpreter."""
        if request.param == 2:
            monkeypatch.setattr(kernel, "SINGLE", 32)
            monkeypatch.setattr(kernel, "BLOCK", 32)

    def run_and_check(shape, seed, **options):
        case = cases.make(seed, shape, **options)
        run = case.clone()
        run.run(backend="triton")
        cases.check(case, run, interpreted=True)

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("shape", [(1, 1, 1, 1), ONE_LAUNCH, (4, 4, 32, 32), (2, 4, 3, 8, 8), (256, 1, 1, 3)])
    def test_one_launch(shape, seed):
        assert kernel.launch_shape(math.prod(shape[1:]))[1] == 1
        run_and_check(shape, seed, slots=seed)

    @pytest.mark.parametrize("shape", [TWO_LAUNCHES, (1, 4, 96, 96), (1, 4, 256, 256)])
    def test_two_launches(shape):
        assert kernel.launch_shape(math.prod(shape[1:]))[1] > 1
        run_and_check(shape, 1)

    def test_sd15_takes_one_launch():
        assert kernel.launch_shape(4 * 64 * 64)[1] == 1

    def test_more_partial_sums_than_one_round_adds_up(monkeypatch):
        monkeypatch.setattr(kernel, "PARTIALS", 4)
        run_and_check(TWO_LAUNCHES, 1, uniform=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_noise_and_memory_formats(dtype, launches):
        for seed, (noise, channels_last) in enumerate([(None, True), (torch.float32, False), (dtype, True)]):
            run_and_check(ONE_LAUNCH, seed, dtype=dtype, noise=noise, channels_last=channels_last)

    @pytest.mark.parametrize(
        "options",
        [
            {"both": False},
            {"halves": 1, "timestep": torch.int64},
            {"halves": None, "timestep": None},
            {"extra_channels": 4, "slots": 0},
            {"uniform": True, "noise": torch.float32, "slots": 3},
            {"combined": torch.float32},
            {"anchored": True},
            {"anchored": True, "combined": torch.float32, "noise": torch.float32},
            {"anchored": True, "dtype": torch.float16, "channels_last": True, "extra_channels": 4},
            {"anchored": True, "both": False},
            {"combined": torch.float16, "dtype": torch.float16, "both": False, "channels_last": True},
        ],
        ids=str,
    )
    def test_options(options, launches):
        for seed in range(2):
            run_and_check(ONE_LAUNCH, seed, **options)

    @pytest.mark.parametrize("anchored", [False, True])
    def test_bits_do_not_depend_on_the_batch(launches, anchored):
        batches.check_batch_invariance((32, 4, 3, 5), backend="triton", dtype=torch.float16, anchored=anchored, every=5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_the_callers_combination_keeps_its_bits(dtype, launches):
        batches.check_combined_bits("triton", dtype)

    def test_whole_generations_decide_as_the_reference():
        with warnings.catch_warnings(action="ignore"):  # overflow to infinity is part of the curves
            decisions.play_and_check(*decisions.random_generation(0), backend="triton")
