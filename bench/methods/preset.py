"""fastguard itself: a preset, a policy or a policy file, with what its report says of each image."""

from __future__ import annotations

import os
from typing import Any

import torch

import fastguard
from bench.methods.base import Method, Request
from fastguard.pipelines.families import find
from fastguard.policies.policy import Policy


class Preset(Method):
    """`fastguard.policy(source, **overrides)` on the pipeline for the length of a call.

    details: the image's report without its policy (`ImageReport.to_dict`): d_curve, timesteps, transition_step, margin, gate, ...
    """

    def __init__(self, source: str | os.PathLike[str] | Policy, *, name: str | None = None, **overrides: Any) -> None:
        self.policy = fastguard.policy(source, **overrides)
        self.name = str(self.policy.name) if name is None else name

    def check(self, pipe: Any) -> None:
        """TypeError unless the pipeline is on fastguard's allow-list."""
        find(type(pipe))

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        guard = fastguard.enable(pipe, "cfg")
        guard.policy = self.policy  # enable would warn at every call that ordinary prompts are guarded too
        try:
            latents = pipe(**request.arguments).images
            report = guard.report
        finally:
            guard.disable()
        assert report is not None
        return latents, [_without_policy(image) for image in report]


def _without_policy(image: fastguard.ImageReport) -> dict[str, Any]:
    return {key: value for key, value in image.to_dict().items() if key != "policy"}
