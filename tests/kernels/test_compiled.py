"""The compiled CPU backend against the float64 reference, its bits, its decisions and its failures."""

import shutil

import pytest
import torch
from hypothesis import given, settings

from fastguard.kernels import compiled

from . import cases
from . import test_decisions_of_the_op as decisions

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 4, 3, 5), (3, 4, 67, 65), (6, 4, 32, 32), (2, 4, 3, 8, 8)])
def test_compiled_equals_the_reference(shape, seed):
    noise = torch.float32 if seed % 2 else None
    case = cases.make(seed, shape, slots=seed, noise=noise, both=seed != 2, channels_last=seed == 3)
    run = case.clone()
    run.run(backend="compiled")
    cases.check(case, run)


@pytest.mark.parametrize(
    "options", [{"halves": 1, "timestep": torch.int64}, {"halves": None, "timestep": None}], ids=str
)
def test_options(options):
    for seed in range(6):
        case = cases.make(seed, (6, 4, 8, 8), **options)
        run = case.clone()
        run.run(backend="compiled")
        cases.check(case, run)


def test_half_precision_goes_to_the_twin():
    case = cases.make(0, (6, 4, 8, 8), dtype=torch.bfloat16)
    run, twin = case.clone(), case.clone()
    run.run(backend="compiled")
    twin.run(backend="torch")
    cases.same_bits(run.arguments["x"], twin.arguments["x"], "x")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(32, 4, 3, 5), (32, 4, 33, 31), (8, 4, 93, 91)])
def test_bits_do_not_depend_on_the_batch(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cases.check_batch_invariance(shape, backend="compiled")
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(decisions.generations())
def test_decisions_equal_the_reference(generation):
    decisions.play_and_check(*generation, backend="compiled")


def test_a_missing_compiler_and_a_failing_one_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    compiled.library.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'compiled': false failed"):
        compiled.library()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        compiled.library()
    compiled.library.cache_clear()
