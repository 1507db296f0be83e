"""The images of a batch, made by one call of a guarded pipeline, and what is known of each."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from PIL import Image

from fastguard import __version__
from fastguard.batch.cuts import cuts
from fastguard.batch.planning import arguments
from fastguard.batch.request import Request
from fastguard.batch.screening import Key, decided, key, statistics
from fastguard.loop.report import ImageReport
from fastguard.pipelines.enabled import guard_disabled
from fastguard.pipelines.guard import Guard, enable
from fastguard.policies.policy import Policy

VERSIONS = {"fastguard": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
_REQUESTED = ("id", "remake_of", "prompt", "negative_prompt", "seed", "steps")
_REPORTED = (
    "policy_hash", "transition_step", "transition_timestep", "minimum_timestep", "margin", "forced", "gate", "collapse", "suspect",
    "non_finite", "d_curve", "share_curve", "timesteps", "denoiser_rows", "path", "reason",
)  # fmt: skip


class Maker:
    """Makes images with `pipe`, which must be a text-to-image pipeline that the guard knows. `close` gives it back as it was.

    settings   of the model (name, dtype, scheduler): part of the images' records
    """

    def __init__(self, pipe: Any, settings: dict[str, Any]) -> None:
        before = Guard.of(pipe)
        self._policy_before = None if before is None else before.policy
        self.pipe, self.settings = pipe, settings
        self.guard = enable(pipe, "cfg")
        self.guard.steps_checked = True  # by the task, for all policies of the job
        self.device = str(pipe._execution_device)  # walks through all modules: asked once
        self._means: dict[tuple[Key, int], float] = {}  # of screened prompts
        self._scale = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default

    def close(self) -> None:
        if self._policy_before is None:
            self.guard.disable()
        else:
            self.guard.policy = self._policy_before

    def interrupt(self) -> None:
        """Have the call that is running skip its remaining steps; what it returns then is of no use."""
        self.pipe._interrupt = True

    def make(self, batch: Sequence[Request]) -> list[tuple[Image.Image, dict[str, Any]]]:
        """Image and record of requests of one `planning.shape`, each with its own seed, scale and policy."""
        first = batch[0]
        screens = self._screened(batch)
        policies = [
            request.policy if screen is None else decided(request.policy, screen["flagged"])
            for request, screen in zip(batch, screens, strict=True)
        ]
        self.guard.policy = policies[0] if len(set(policies)) == 1 else Policy.stack(policies)
        by_call = guard_disabled() or not first.guided  # else the policies have the scales
        ends = cuts(self.pipe, (text for request in batch for text in (request.prompt, request.negative_prompt)))
        begin = time.perf_counter()
        output = self.pipe(
            **arguments(batch, scale=first.stock_scale if by_call else None),
            # On the host: the same noise on every device, and for an image whatever batch it is in.
            generator=[torch.Generator("cpu").manual_seed(request.seed) for request in batch],
            output_type="pt",
        )
        images, finite = _pictures(self.pipe, output.images)  # waits for the device
        seconds = (time.perf_counter() - begin) / len(batch)
        shared = {"batch": len(batch), "seconds": round(seconds, 6), "device": self.device, "versions": VERSIONS}
        blacked = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
        reports = [None] * len(batch) if guard_disabled() else self.guard.report.images  # type: ignore[union-attr]
        made = []
        for i, request in enumerate(batch):
            record = self._record(request, policies[i], images[i], reports[i])
            told = {
                "prompt_cut": ends.get(request.prompt, ""),
                "negative_prompt_cut": ends.get(request.negative_prompt or "", ""),
                "screen": screens[i],
                "blacked": bool(blacked[i]),
                "vae_non_finite": not finite[i],
            }
            made.append((images[i], record | told | shared))
        return made

    def _screened(self, batch: Sequence[Request]) -> list[dict[str, Any] | None]:
        """What the means of the images' prompts say, where they are to be screened. A prompt is measured once."""
        if batch[0].screen is None or guard_disabled():
            return [None] * len(batch)
        noises, bound = batch[0].screen
        new = list({key(request): request for request in batch if (key(request), noises) not in self._means}.values())
        if new:
            values = statistics(self.pipe, new, noises, most=len(batch))
            self._means |= {(key(r), noises): sum(own) / noises for r, own in zip(new, values, strict=True)}
        means = [self._means[key(request), noises] for request in batch]
        return [{"flagged": mean >= bound, "mean": mean, "bound": bound, "noises": noises} for mean in means]

    def _record(self, request: Request, policy: Policy, image: Any, report: ImageReport | None) -> dict[str, Any]:
        """The manifest's line, and what an image's file says about itself. A field has one type in all images."""
        own: Any = policy.guidance_scale
        scale = next(s for s in (request.guidance_scale, own, self._scale) if s is not None)
        return {
            "request": request.digest(self.settings),
            **{name: getattr(request, name) for name in _REQUESTED},
            "guidance_scale": None if isinstance(own, tuple) else float(scale),  # None if the policy has one per row
            "policy": policy.name,
            "policy_json": json.dumps(policy.to_dict()),
            "width": image.width,
            "height": image.height,
            **self.settings,
            "scheduler": type(self.pipe.scheduler).__name__,
            **{name: _told(report, name) for name in _REPORTED},
            "gate_text": report and report.gate_text(),
            "transition_text": report and report.transition_text(),
        }


def _told(report: ImageReport | None, name: str) -> Any:
    """A field of the report; None for a curve without a single value: readers of tables find no type in it."""
    value = getattr(report, name, None)
    return None if isinstance(value, tuple) and all(item is None for item in value) else value


def _pictures(pipe: Any, images: Any) -> tuple[list[Image.Image], list[bool]]:
    """A pipeline's images with output_type="pt", and whether all that the autoencoder returned was finite."""
    if not isinstance(images, torch.Tensor):
        return list(images), [True] * len(images)
    processor = pipe.image_processor
    return processor.numpy_to_pil(processor.pt_to_numpy(images)), images.flatten(1).isfinite().all(1).tolist()
