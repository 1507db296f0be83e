"""Recorded in the simulator: tests that ask for `recorders`."""

from __future__ import annotations

import pytest
import torch

from tests import pipelines
from tests.capture import simulator


@pytest.fixture
def recorders():
    with simulator.recording() as made:
        yield made


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors this small: on a busy machine threads that wait for each other made a test of half a second take 17."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
