"""Images from prompts into a directory: from a prompt file or a list, on one device or many, resumable.

    import fastguard

    summary = fastguard.generate("path/or/id", "prompts.csv", "out", policy="dtp", gate=0.03)

manifest.jsonl in the directory has one line per finished image and says all that is known of it. The same call again makes only
what is missing. See docs/generate.md and docs/ray.md; the machinery is in `fastguard.batch`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastguard.batch import screening
from fastguard.batch.fitting import Limits
from fastguard.batch.job import Interrupted, Job, Runner
from fastguard.batch.local import LocalRunner
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import BadRows, Source, load
from fastguard.batch.request import FIELDS, Request, checked
from fastguard.batch.summary import Summary
from fastguard.batch.tables import Problem, Prompts
from fastguard.pipelines import loading as models
from fastguard.pipelines.enabled import guard_disabled
from fastguard.pipelines.quiet import hushed
from fastguard.policies.policy import Policy
from fastguard.policies.provenance import elsewhere

__all__ = [
    "FIELDS",
    "BadRows",
    "Interrupted",
    "JobOptions",
    "Problem",
    "Request",
    "Summary",
    "Task",
    "generate",
    "prepare",
]

logger = logging.getLogger("fastguard")


def generate(
    model: Any, prompts: Prompts, out: str | os.PathLike[str], *, progress: bool = True, **options: Any
) -> Summary:
    """Make the images of `prompts` in the directory `out`; those that are there already are kept.

    model     directory or hub id of a text-to-image pipeline; a pipeline (local only), used as it is
    prompts   file (.txt, .csv, .jsonl, .parquet); list of prompts or of mappings with the fields `FIELDS`; DataFrame, dataset
    options   of `fastguard.batch.options.JobOptions`: policy, gate, seed, steps, batch_size, ...

    Before anything is written: BadRows (a ValueError; `problems` has the lines) for bad rows, ValueError for another argument that is
    not allowed or a model that cannot be loaded, OSError for a file that cannot be read, TypeError for an unknown option or a pipeline
    that the guard does not know. Afterwards `Interrupted` (SIGTERM, SIGINT), OSError (disk full) or the error of an image: what the
    manifest lists by then is done, and the same call goes on from there.
    """
    with ExitStack() as stack:
        with hushed():
            task = stack.enter_context(prepare(model, prompts, out, **options).open())
        return task.run(progress=progress)


def prepare(model: Any, prompts: Prompts, out: str | os.PathLike[str], **options: Any) -> Task:
    """A batch job, checked: every prompt, the model's configuration and the directory. Loads no weights and writes nothing.

    Arguments and errors are those of `generate`.
    """
    wanted = options_for(model, JobOptions.of(options))
    requests, problems = load(prompts, wanted)
    settings, loader, limits = model_of(model, wanted)
    if guard_disabled():
        settings["guard"] = "disabled"  # such images are not to be taken for guarded ones later
    job = Job(requests, problems, Path(out), settings=settings, source=Source.of(prompts), options=wanted)
    job.leave_out(limits.problems(job.requests))
    if wanted.screen and all(request.screen is None for request in job.requests):
        raise ValueError("screen=True: has no effect, no row has a policy that guards")
    if wanted.remake and all(request.policy.suspect is None for request in job.requests):
        raise ValueError(
            "remake=True: has no effect, no row has a policy with `suspect`; `fastguard calibrate` finds its bound"
        )
    for warning in _warnings(job.requests, models.facts(model, settings["scheduler"], settings["dtype"])):
        logger.warning(warning)
    if wanted.engine == "local":
        return Task(job, LocalRunner(loader, settings=settings, options=wanted))

    from fastguard.batch.ray_runner import RayRunner

    return Task(job, RayRunner(loader, settings=settings, options=wanted))


def options_for(model: Any, given: JobOptions) -> JobOptions:
    """The options with the policy (a Policy, with their gate) and the guidance scale that the model has where none is given, checked."""
    chosen = models.chosen_policy(model, given.policy)
    scale = models.chosen_scale(model, given.guidance_scale, chosen)
    return checked(dataclasses.replace(given, policy=chosen, guidance_scale=scale))


class Task:
    """A checked job. `open` loads the model, if an image is missing, and makes the job's directory ours; `run`, inside it, works."""

    def __init__(self, job: Job, runner: Runner) -> None:
        self.job, self._runner = job, runner
        self._started = False
        job.refuse()

    @contextmanager
    def open(self) -> Iterator[Task]:
        """ValueError if the model cannot be loaded or another process works in the directory: till then nothing is written."""
        with ExitStack() as stack:
            stack.callback(self._close)
            if self.job.missing():
                self._start()
            stack.enter_context(self.job.open())
            yield self

    def run(self, *, progress: bool = True) -> Summary:
        return self.job.run(self._start, progress=progress)

    def _start(self) -> Runner:
        if not self._started:
            self._started = True
            self._runner.start()
        return self._runner

    def _close(self) -> None:
        if self._started:
            self._runner.close()


def _warnings(requests: Sequence[Request], used: Mapping[str, Any]) -> Iterator[str]:
    """What to tell once of the policies of a job, and of what each was calibrated with."""
    uses = dict.fromkeys((request.policy, request.steps) for request in requests)
    unscreened = list(dict.fromkeys(request.policy for request in requests if request.screen is None))
    if unscreened and (ungated := Policy.stack(unscreened).ungated_warning()):
        yield ungated
    for name in dict.fromkeys(r.policy.name for r in requests if r.screen and not r.policy.provenance.get("screen")):
        yield f"policy {name!r} has no bound on the mean over noises: its gate, one for a single image, is taken for screening"
    yield from dict.fromkeys(told for request in requests if request.screen and (told := screening.elsewhere(request)))
    yield from dict.fromkeys(told for one, steps in uses for told in elsewhere(one, {**used, "steps": steps}))


def model_of(model: Any, options: JobOptions) -> tuple[dict[str, Any], Callable[[], Any], Limits]:
    """The settings that records name, how to get the pipeline, and what it allows."""
    if not isinstance(model, (str, os.PathLike)):
        for name in ("engine", "dtype", "device", "scheduler", "variant"):
            if getattr(options, name) != getattr(JobOptions, name):
                value = getattr(options, name)
                raise ValueError(f"{name}={value!r}: needs a model given by name, this one is a pipeline already")
        settings = {
            "model": str(getattr(model, "name_or_path", "") or type(model).__name__),
            "dtype": str(model.dtype).removeprefix("torch."),
            "scheduler": type(model.scheduler).__name__,
        }
        return settings, lambda: model, Limits.of_pipeline(model)

    name = os.fspath(model)
    kind = None if options.scheduler is None else models.scheduler_class(options.scheduler).__name__
    device, dtype = options.device, options.dtype
    if options.engine == "ray":  # the actors have the devices, this machine may have none
        device = ("cuda" if options.gpus_per_actor else "cpu") if device == "auto" else device
        if dtype == "auto":
            dtype = "float16" if device.startswith("cuda") else "float32"
    else:
        device, dtype = models.prepare(device, dtype)
    # Actors have other working directories.
    where = os.path.abspath(name) if os.path.isdir(name) else name
    loader = functools.partial(_load, where, dtype=dtype, device=device, scheduler=kind, variant=options.variant)
    named: dict[str, Any] = {"model": name, "dtype": dtype, "scheduler": kind, "variant": options.variant}
    return named, loader, Limits.of_model(name, kind)


def _load(name: str, **options: Any) -> Any:
    """The pipeline; looked up when it is called, in an actor too."""
    return models.load_pipeline(name, **options)
