from __future__ import annotations

import pytest

from fastguard.batch.task import generate
from tests import pipelines
from tests.batch.jobs import OPTIONS, ROWS


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A saved Stable Diffusion pipeline, tiny and random."""
    path = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(path)
    return str(path)


@pytest.fixture
def pipe():
    return pipelines.sd()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    generate(pipelines.sd(), ROWS, out, **OPTIONS)
    return out
