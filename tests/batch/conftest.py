from __future__ import annotations

import pytest

from tests import pipelines


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A saved Stable Diffusion pipeline, tiny and random."""
    path = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(path)
    return str(path)


@pytest.fixture
def pipe():
    return pipelines.sd()
