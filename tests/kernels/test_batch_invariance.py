"""A sample's bits do not depend on the batch around it, its place there, or the number of threads."""

import pytest
import torch

from fastguard.kernels.torch_step import PART

from . import batches, cases

# Odd sizes put the vectorised body and the tail of torch's loops at other elements of a sample in every batch; the large ones are
# split between threads (torch's grain is 32,768 elements).
SHAPES = [(32, 1, 1, 1), (32, 4, 3, 5), (32, 4, 33, 31), (8, 4, 93, 91)]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("anchored", [False, True])
def test_torch(shape, threads, anchored):
    batches.check_batch_invariance(shape, backend="torch", anchored=anchored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_in_half_precision(dtype, threads):
    batches.check_batch_invariance(
        (32, 4, 9, 7), backend="torch", dtype=dtype, noise=dtype, combined=dtype, channels_last=True
    )


@pytest.mark.parametrize("size", [1, 7, PART, PART + 1, 3 * PART])
def test_torch_sums_d_alike_whatever_the_number_of_threads(size):
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        case = cases.make(0, (3, 1, 1, size), uniform=True)
        case.run(backend="torch")
        results.append(case.arguments["trace"])
    torch.set_num_threads(1)
    batches.same_bits(results[1], results[0], "d with 2 threads")
    batches.same_bits(results[2], results[0], "d with 3 threads")


def test_planted_last_bit_that_depends_on_the_batch_is_found(monkeypatch):
    run = cases.Case.run

    def faulty(self, **options):
        run(self, **options)
        x = self.arguments["x"]
        x.mul_(1 + len(x) * torch.finfo(x.dtype).eps)

    monkeypatch.setattr(cases.Case, "run", faulty)
    with pytest.raises(AssertionError, match="alone"):
        batches.check_batch_invariance((4, 4, 3, 5), backend="torch")
