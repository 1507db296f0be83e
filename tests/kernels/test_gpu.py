"""The Triton kernels on a real device against the float64 reference: what only a GPU can prove."""

import pytest
import torch

from . import batches, cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
SHAPES = [
    (1, 1, 1, 1),
    (5, 4, 3, 5),
    (3, 4, 67, 65),
    (8, 4, 64, 64),
    (2, 4, 128, 128),
    (2, 16, 5, 32, 32),
    (1, 4, 256, 256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_device_equals_the_reference(shape, dtype):
    for seed in range(4):
        case = cases.make(
            seed,
            shape,
            dtype=dtype,
            slots=seed,
            noise=dtype if seed % 2 else None,
            both=seed != 3,
            channels_last=seed == 2,
            anchored=seed in (1, 2),
            combined=dtype if seed == 2 else None,
        )
        run = case.to("cuda")
        run.run()
        cases.check(case, run.to("cpu"))


@pytest.mark.parametrize("shape", [(32, 4, 3, 5), (32, 4, 64, 64), (8, 4, 128, 128), (256, 4, 8, 8)])
def test_bits_do_not_depend_on_the_batch(shape):
    case = cases.make(0, shape, dtype=torch.float16)
    whole = case.to("cuda")
    whole.run()
    for b in range(0, shape[0], 5):
        single = batches.alone(case, b).to("cuda")
        single.run()
        for name, tensor in batches.alone(whole.to("cpu"), b).arguments.items():
            if tensor is not None:
                batches.same_bits(single.arguments[name].cpu(), tensor, f"{name} of sample {b} alone")


def test_no_host_synchronisation():
    case = cases.make(0, (2, 4, 64, 64), dtype=torch.float16).to("cuda")
    case.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
