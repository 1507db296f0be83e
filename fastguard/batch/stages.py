"""One batch through a guarded pipeline: encode, denoise, decode. Each stage may run in a thread of its own."""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

import fastguard
from fastguard.batch.cuts import Cuts
from fastguard.batch.decoding import Decoded, decoder, of_call
from fastguard.batch.fitting import guard_disabled
from fastguard.batch.memory import halving
from fastguard.batch.request import Request
from fastguard.batch.text import TextStage
from fastguard.loop.report import ImageReport, Report
from fastguard.pipelines.guard import Guard, enable
from fastguard.policies.policy import Policy

VERSIONS = {"fastguard": fastguard.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


@dataclass
class Denoised:
    """What the loop left. images: already decoded, where the pipeline's own call did that; seconds(): of the whole batch."""

    batch: Sequence[Request]
    latents: torch.Tensor | None
    images: list[Decoded] | None
    report: Report | None  # none if the guard is disabled
    seconds: Callable[[], float]
    ready: Any = None  # event after which another stream may read the latents


class Stages:
    """The stages of `pipe` for the images of one job. `close` gives the pipeline back as it was.

    pipe       a text-to-image pipeline on the allow-list
    requests   all images of the job, those that are done too (see `TextStage`)
    settings   of the model (name, dtype, scheduler): part of the images' records
    """

    def __init__(self, pipe: Any, requests: Iterable[Request], settings: dict[str, Any]) -> None:
        before = Guard.of(pipe)
        self._policy_before = None if before is None else before.policy
        self.pipe, self.settings = pipe, settings
        self.guard = enable(pipe, "cfg")
        self.guard.told = True  # by the task, of all policies of the job
        self.device = pipe._execution_device  # walks through all modules: asked once
        self._decode = decoder(pipe)
        on_cpu = torch.device(self.device).type == "cpu"
        # Cheaper, and on the CPU safe: tensors made so may not be changed in place afterwards, as the buffers of CUDA graphs are.
        self._no_grad = torch.inference_mode if on_cpu else torch.no_grad
        # A CPU convolves faster so. Offloaded models are left alone.
        modules = pipe.components.values() if on_cpu and self._decode is not None else ()
        self._relaid = [m for m in modules if isinstance(m, torch.nn.Module) and _to_channels_last(m)]
        self._cuts = Cuts(pipe)
        self._text = None if self._decode is None else TextStage(pipe, requests, self.device)
        self._scale = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
        self._disabled = guard_disabled()
        self._stream: Any = None

    def close(self) -> None:
        for module in self._relaid:
            module.to(memory_format=torch.contiguous_format)
        if self._policy_before is None:
            self.guard.disable()
        else:
            self.guard.policy = self._policy_before

    @property
    def overlap(self) -> bool:
        """Whether text and decoding gain from running beside the loop: not on the CPU where torch's threads keep all its cores busy."""
        return torch.device(self.device).type != "cpu" or torch.get_num_threads() < _cores()

    def interrupt(self) -> None:
        """Have the loop that is running skip its remaining steps; what it returns then is of no use."""
        self.pipe._interrupt = True

    def encode(self, batch: Sequence[Request]) -> dict[str, Any]:
        """The text as arguments of the pipeline; plain prompts where it must encode them itself."""
        if self._text is not None:
            self._read_cuts(batch)
            with self._no_grad():
                return self._text.encode(batch)
        arguments: dict[str, Any] = {"prompt": [request.prompt for request in batch]}
        if any(request.negative_prompt is not None for request in batch):
            arguments["negative_prompt"] = [request.negative_prompt or "" for request in batch]
        return arguments

    def _read_cuts(self, batch: Sequence[Request]) -> None:
        self._cuts.read(text for request in batch for text in (request.prompt, request.negative_prompt))

    def denoise(self, batch: Sequence[Request], text: dict[str, Any]) -> Denoised:
        """One call of the pipeline for images of one shape, each with its own seed, scale and policy."""
        first = batch[0]
        size = {name: value for name, value in (("height", first.height), ("width", first.width)) if value}
        policies = [request.policy for request in batch]
        same = all(policy == policies[0] for policy in policies)
        self.guard.policy = policies[0] if same else Policy.stack(policies)
        scale = first.stock_scale if self._disabled or not first.guided else None  # else the policies have them
        if self._text is None:  # the pipeline tokenizes in this thread
            self._read_cuts(batch)
        watch = _Watch(self.device)
        with self._no_grad():
            result = self.pipe(
                **text,
                **size,
                num_inference_steps=first.steps,
                # On the host: the same noise on every device, and for an image whatever batch it is in.
                generator=[torch.Generator("cpu").manual_seed(request.seed) for request in batch],
                output_type="pt" if self._decode is None else "latent",
                **({} if scale is None else {"guidance_scale": scale}),
            )
        watch.stop()
        report = None if self._disabled else self.guard.report
        latents, images = (None, of_call(self.pipe, result)) if self._decode is None else (result.images, None)
        return Denoised(batch, latents, images, report, watch.seconds, watch.end)

    def decode(self, denoised: Denoised) -> list[Decoded]:
        """The images; beside the next batch's loop, on a stream of its own where the device has streams."""
        if denoised.images is not None:
            return denoised.images
        latents, work = denoised.latents, self._decode
        if latents is None or work is None:
            raise RuntimeError("nothing to decode")

        def part(rows: Sequence[torch.Tensor]) -> list[Decoded]:
            return work(self.pipe, torch.stack(list(rows)))

        with self._no_grad():
            if not latents.is_cuda:
                parts = halving(part, list(latents))
            else:
                self._stream = self._stream or torch.cuda.Stream(latents.device)
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(denoised.ready)
                    latents.record_stream(self._stream)
                    parts = halving(part, list(latents))
        return [image for images in parts for image in images]

    def record(self, denoised: Denoised, index: int, decoded: Decoded) -> dict[str, Any]:
        """All that is known of an image: the manifest's line, and what its file says about itself. A field has one type in all images."""
        request: Request = denoised.batch[index]
        own: Any = request.policy.guidance_scale
        return {
            "id": request.id,
            "request": request.digest(self.settings),
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "steps": request.steps,
            # None if the policy has one per row
            "guidance_scale": None
            if isinstance(own, tuple)
            else float(next(s for s in (request.guidance_scale, own, self._scale) if s is not None)),
            "policy": request.policy.name,
            "policy_json": json.dumps(request.policy.to_dict()),
            "width": decoded.image.width,
            "height": decoded.image.height,
            **self.settings,
            "scheduler": type(self.pipe.scheduler).__name__,
            **_reported(None if denoised.report is None else denoised.report.images[index]),
            "prompt_cut": self._cuts[request.prompt],
            "negative_prompt_cut": self._cuts[request.negative_prompt],
            "blacked": decoded.blacked,
            "vae_non_finite": not decoded.finite,
            "batch": len(denoised.batch),
            "seconds": round(denoised.seconds() / len(denoised.batch), 6),
            "device": str(self.device),
            "versions": VERSIONS,
        }


_REPORTED = (
    "transition_step", "transition_timestep", "minimum_timestep", "margin", "forced", "gate", "non_finite", "d_curve", "timesteps",
    "denoiser_rows", "path", "reason",
)  # fmt: skip


def _reported(report: ImageReport | None) -> dict[str, Any]:
    texts = {"gate_text": report and report.gate_text(), "transition_text": report and report.transition_text()}
    return {name: getattr(report, name, None) for name in _REPORTED} | texts


def _to_channels_last(module: torch.nn.Module) -> bool:
    """Lay the weights of a float32 module's convolutions out channels last; False if there are none to change."""
    kernels = [p for p in module.parameters() if p.dim() == 4]
    if not kernels or any(p.dtype != torch.float32 or not p.is_contiguous() for p in kernels):
        return False
    module.to(memory_format=torch.channels_last)
    return True


def _cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Watch:
    """Seconds that a device spends, without waiting for it until they are asked for."""

    def __init__(self, device: Any) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.begin: Any = self._now()
        self.end: Any = None

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self.end = self._now()

    def seconds(self) -> float:
        if not self.cuda:
            return self.end - self.begin
        self.end.synchronize()
        return self.begin.elapsed_time(self.end) / 1000
