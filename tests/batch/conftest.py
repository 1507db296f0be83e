from __future__ import annotations

import pytest

from fastguard.batch.stages import Stages
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


@pytest.fixture(params=[False, True], ids=["in turn", "overlapped"])
def overlap(request, monkeypatch):
    """Text and decoding in the caller's thread or beside the loop, whatever this machine would choose."""
    monkeypatch.setattr(Stages, "overlap", request.param)
    return request.param
