"""One pipeline and one judge for all tests of the embedded model."""

import pytest
import torch

from fastguard import testbed
from fastguard.testbed.measures import Judge


@pytest.fixture(scope="session")
def pipe():
    return testbed.load()


@pytest.fixture(scope="session")
def judge(pipe):
    return Judge(pipe)


@pytest.fixture(autouse=True)
def _guard_off(request):
    yield
    if "pipe" in request.fixturenames:
        guard = request.getfixturevalue("pipe").__dict__.get("_fastguard_guard")
        if guard is not None:
            guard.disable()


@pytest.fixture
def noise():
    return torch.randn(40, 8, 8, 8, generator=torch.manual_seed(0))
