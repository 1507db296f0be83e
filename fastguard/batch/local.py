"""Batches to images in this process: while one is made, the files of the one before it are encoded and written."""

from __future__ import annotations

import gc
import inspect
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import diffusers
import torch
from PIL import Image

from fastguard import __version__
from fastguard.batch.cuts import cuts
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import encode
from fastguard.batch.planning import Batch, arguments
from fastguard.batch.request import Request
from fastguard.batch.screening import Key, decided, key, statistics
from fastguard.batch.store import Made
from fastguard.loop.report import ImageReport
from fastguard.pipelines.enabled import guard_disabled
from fastguard.pipelines.guard import enable
from fastguard.policies.policy import Policy

VERSIONS = {"fastguard": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
_REQUESTED = ("id", "remake_of", "prompt", "negative_prompt", "seed", "steps")
_REPORTED = (
    "policy_hash", "transition_step", "transition_timestep", "minimum_timestep", "margin", "forced", "gate", "collapse", "suspect",
    "non_finite", "d_curve", "share_curve", "timesteps", "denoiser_rows", "path", "reason",
)  # fmt: skip

logger = logging.getLogger("fastguard")


@dataclass(frozen=True)
class Failed:
    """An image that could not be made. fatal: the next one would meet the error too (a full disk, no permission)."""

    request: Request
    error: Exception
    message: str
    fatal: bool

    @classmethod
    def of(cls, request: Request, error: Exception) -> Failed:
        # Pillow raises OSErrors of its own, without a number, for what it cannot encode.
        fatal = isinstance(error, OSError) and error.errno is not None and not isinstance(error, IsADirectoryError)
        return cls(request, error, f"{type(error).__name__}: {error}", fatal)


Result = Made | Failed
Prepare = Callable[[Made], Made]


def attempt(work: Prepare, item: Result) -> Result:
    """What comes of an image; one that had failed before stays so."""
    try:
        return item if isinstance(item, Failed) else work(item)
    except Exception as error:
        return Failed.of(item.request, error)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class LocalRunner:
    """engine="local": one process, with the text-to-image pipeline that `load` gives and the guard knows. `close` gives it back as it was.

    settings   of the model (name, dtype, scheduler): part of the images' records

    Out of memory halves the batch, and the batches after it are no larger than what fitted. Where another error comes up, the run ends
    with it, or, keeping going, the images of the batch are made one by one.
    """

    phase = ""  # what the first image waits for, if it is nothing of its own

    def __init__(self, load: Callable[[], Any], settings: dict[str, Any], options: JobOptions) -> None:
        self.load, self.settings, self.options = load, settings, options
        self.pipe: Any = None
        self._guarding = ExitStack()
        self._means: dict[tuple[Key, int], float] = {}  # of screened prompts
        self._limit = options.batch_size  # images per call; fewer once memory was short
        self._stopped = False

    def start(self) -> None:
        """Load the model, once. ValueError, OSError if it cannot run."""
        if self.pipe is None:
            self.pipe = self.load()
            self.guard = self._guarding.enter_context(enable(self.pipe, "cfg"))
            self.guard.steps_checked = True  # by the task, for all policies of the job
            self._device = str(self.pipe._execution_device)  # walks through all modules: asked once

    def run(self, batches: Sequence[Batch], prepare: Prepare) -> Generator[list[Result], None, None]:
        """The images of `batches` in groups; `prepare` is called in a pool, with each of them."""

        def finish(made: Made) -> Made:
            return prepare(replace(made, image=None, data=encode(made.image, made.record, self.options)))

        threads = self.options.workers or (1 if self.options.engine == "ray" else min(8, os.cpu_count() or 1))
        with ThreadPoolExecutor(threads, thread_name_prefix="fastguard-write") as pool:
            before: list[Any] = []
            for group in chain(self._made(batches), [[]]):
                now = [pool.submit(attempt, finish, item) for item in group]
                if before:
                    yield [future.result() for future in before]
                before = now

    def stop(self) -> None:
        """End the run at the next denoising step. Images that were made before are still finished and yielded."""
        self._stopped = True
        if self.pipe is not None:
            self.pipe._interrupt = True  # it skips its remaining steps; what it returns then is of no use

    def close(self) -> None:
        self._guarding.close()

    def _made(self, batches: Sequence[Batch]) -> Iterator[Sequence[Result]]:
        todo = deque(batches)
        while todo and not self._stopped:
            batch = todo.popleft()
            if len(batch) > self._limit:
                todo.extendleft([batch[self._limit :], batch[: self._limit]])
                continue
            try:
                made = self.make(batch)
            except Exception as error:
                failed = Failed.of(batch[0], error.with_traceback(None))  # the frames keep tensors alive
            else:
                if not self._stopped:  # else it was interrupted in its loop: these are no images
                    yield made
                continue
            if len(batch) > 1 and out_of_memory(failed.error):
                self._limit = (len(batch) + 1) // 2
                logger.warning("out of memory with %d images at a time: going on with %d", len(batch), self._limit)
                gc.collect()
                torch.cuda.empty_cache()  # does nothing where CUDA was not used
                todo.appendleft(batch)
            elif len(batch) > 1 and self.options.keep_going:
                todo.extendleft([request] for request in reversed(batch))
            else:
                yield [failed]
                if not self.options.keep_going:
                    return

    def make(self, batch: Batch) -> list[Made]:
        """The images of requests of one `planning.shape`, each with its own seed, scale and policy, by one call of the pipeline."""
        first, size = batch[0], len(batch)
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
        seconds = round((time.perf_counter() - begin) / size, 6)
        blacked = getattr(output, "nsfw_content_detected", None) or [False] * size
        reports = [None] * size if guard_disabled() else self.guard.report.images  # type: ignore[union-attr]
        records = [
            self._record(request, policies[i], images[i], reports[i])
            | {
                "prompt_cut": ends.get(request.prompt, ""),
                "negative_prompt_cut": ends.get(request.negative_prompt or "", ""),
                "screen": screens[i],
                "blacked": bool(blacked[i]),
                "vae_non_finite": not finite[i],
                "batch": size,
                "seconds": seconds,
                "device": self._device,
                "versions": VERSIONS,
            }
            for i, request in enumerate(batch)
        ]
        return list(map(Made, batch, records, images))

    def _screened(self, batch: Batch) -> list[dict[str, Any] | None]:
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
        default = inspect.signature(type(self.pipe).__call__).parameters["guidance_scale"].default
        scale = next(s for s in (request.guidance_scale, own, default) if s is not None)
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
