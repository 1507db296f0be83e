from __future__ import annotations

from pathlib import Path

import pytest

from tests import pipelines


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    pipelines.sd().save_pretrained(path)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fastguard.pipelines.loading.load_pipeline", load)
