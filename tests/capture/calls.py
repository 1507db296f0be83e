"""One call of a pipeline, recorded and eager, for the tests of capture."""

from __future__ import annotations

import torch

import fastguard
from tests import pipelines

SIZE = {"height": 16, "width": 16}
POLICIES = [
    "cfg",
    fastguard.policy("stp", t_star=600),
    fastguard.policy("og+dtp", gate=0.01),
    fastguard.policy("dtp", rule="drop"),
    fastguard.policy("anchored"),
]


def call(pipe, *, steps=3, seeds=(1, 2), size=SIZE, **kwargs):
    defaults = {"prompt": ["a red cat", "two dogs"][: len(seeds)], "guidance_scale": 4.0, **size}
    arguments = {**defaults, "num_inference_steps": steps, "output_type": "latent", **kwargs}
    return pipe(generator=pipelines.generators(list(seeds)), **arguments).images


def eager(pipe, policy="cfg", **kwargs):
    with fastguard.enable(pipe, policy, capture="off") as guard:
        return call(pipe, **kwargs), guard.report


def check(pipe, policy="cfg", mode="step", path=None, times=1, options=None, against=None, **kwargs):
    """Recorded equals eager to the bit, in images and in reports. `against`: what `eager` gave for the same call."""
    expected, report = against or eager(pipe, policy, **kwargs)
    with fastguard.enable(pipe, policy, capture=mode, **(options or {})) as guard:
        for _ in range(times):
            assert torch.equal(call(pipe, **kwargs), expected)
            ours = guard.report
            assert ours.path == (path or f"fused, {mode} graph"), ours.reason
            for a, b in zip(ours, report, strict=True):
                a, b = a.to_dict(), b.to_dict()
                for name in ("path", "reason"):
                    del a[name], b[name]
                assert a == b
    return ours
