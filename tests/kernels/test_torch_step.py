"""The torch backend against the float64 reference."""

import pytest
import torch

from . import batches, cases

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# 1 element, odd, odd over several parts of the sum, SD 1.5 at 256 px, 5-D video, SD3's 16 channels.
SHAPES = [
    (1, 1, 1, 1), (5, 4, 3, 5), (3, 4, 67, 65), (6, 4, 32, 32), (2, 4, 3, 8, 8), (2, 16, 24, 24), (1, 4, 256, 256), (256, 4, 8, 8)
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape, seed):
    case = cases.make(seed, shape, slots=seed)
    run = case.clone()
    run.run(backend="torch")
    cases.check(case, run)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("noise", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_over_dtypes_noise_and_memory_formats(dtype, noise, channels_last):
    for seed in range(6):
        case = cases.make(seed, (7, 4, 9, 8), dtype=dtype, noise=noise, channels_last=channels_last)
        run = case.clone()
        run.run(backend="torch")
        cases.check(case, run)


@pytest.mark.parametrize(
    "options",
    [
        {"both": False},
        {"halves": 1},
        {"halves": None},
        {"extra_channels": 4},
        {"extra_channels": 4, "channels_last": True},
        {"timestep": None},
        {"timestep": torch.int64},
        {"timestep": torch.bfloat16, "uniform": True},
        {"uniform": True, "noise": torch.float32},
        {"combined": torch.float32},
        {"anchored": True},
        {"anchored": True, "combined": torch.float32, "noise": torch.float32},
        {"anchored": True, "dtype": torch.float16, "channels_last": True, "extra_channels": 4},
        {"anchored": True, "both": False},
        {"combined": torch.float16, "dtype": torch.float16, "both": False, "channels_last": True},
    ],
    ids=str,
)
def test_options(options):
    for seed in range(8):
        case = cases.make(seed, (6, 4, 8, 8), **options)
        run = case.clone()
        run.run(backend="torch")
        cases.check(case, run)


@pytest.mark.parametrize("name", ["x", "trace", "model_input", "history"])
def test_planted_wrong_values_are_found(name):
    """A thousandth of the value is enough."""
    case = cases.make(0, (3, 4, 9, 8), slots=3)
    run = case.clone()
    run.run(backend="torch")
    run.arguments[name].mul_(1.001)
    with pytest.raises(AssertionError):
        cases.check(case, run)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_callers_combination_keeps_its_bits(dtype):
    batches.check_combined_bits("torch", dtype)
