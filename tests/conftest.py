"""Tests marked `gpu` run where there is a CUDA or ROCm device and are skipped elsewhere. The library's logger is as it was after each test."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _logger() -> Iterator[None]:
    """Commands give it a handler of their own and take it from the root, where pytest listens."""
    logger = logging.getLogger("fastguard")
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
