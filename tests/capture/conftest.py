"""Recorded in the simulator: tests that ask for `recorders`."""

from __future__ import annotations

import pytest

from tests import pipelines
from tests.capture import simulator


@pytest.fixture
def recorders():
    with simulator.recording() as made:
        yield made


@pytest.fixture(scope="module")
def sd():
    return pipelines.sd()
