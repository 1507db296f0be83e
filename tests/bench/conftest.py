"""The embedded model, few steps, paired seeds."""

from __future__ import annotations

import pytest
import torch

from fastguard import testbed


@pytest.fixture(scope="session")
def pipe():
    return testbed.load()


@pytest.fixture
def generate(pipe):
    """A method on the embedded model; fresh generators, seeded 0, 1, ..., for every call."""

    def run(method, prompts, steps=5, scale=7.5, seeds=None):
        seeds = range(len(prompts)) if seeds is None else seeds
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return method(pipe, prompts, generators, num_inference_steps=steps, guidance_scale=scale)

    return run
