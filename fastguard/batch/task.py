"""`fastguard.generate`: images from prompts into a directory, on one device or many, resumable (docs/generate.md, docs/ray.md)."""

import copy
import dataclasses
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastguard.batch import screening
from fastguard.batch.job import Interrupted, Job
from fastguard.batch.local import LocalRunner
from fastguard.batch.options import JobOptions
from fastguard.batch.prompt_files import BadRows, Problem, Prompts, load
from fastguard.batch.ray_runner import RayRunner
from fastguard.batch.request import Request, parse
from fastguard.batch.summary import Summary
from fastguard.files import short
from fastguard.pipelines import loading as models
from fastguard.pipelines.enabled import guard_disabled, stock_class
from fastguard.pipelines.families import find
from fastguard.pipelines.quiet import hushed
from fastguard.policies.plan import limit_problem
from fastguard.policies.policy import Policy
from fastguard.policies.provenance import elsewhere
from fastguard.schedules.schedule import in_training_steps

__all__ = ["BadRows", "Interrupted", "generate", "misfits", "model_of", "options_for", "prepare"]

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
            job = stack.enter_context(prepare(model, prompts, out, **options).open())
        return job.run(progress=progress)


def prepare(model: Any, prompts: Prompts, out: str | os.PathLike[str], **options: Any) -> Job:
    """A batch job, checked: every prompt, the model's configuration and the directory. Loads no weights and writes nothing.

    Arguments and errors are those of `generate`.
    """
    wanted = options_for(model, JobOptions.of(options))
    requests, problems = load(prompts, wanted)
    settings, loader, skeleton = model_of(model, wanted)
    if guard_disabled():
        settings["guard"] = "disabled"  # such images are not to be taken for guarded ones later
    runner = (RayRunner if wanted.engine == "ray" else LocalRunner)(loader, settings, wanted)
    job = Job(requests, problems, Path(out), settings, prompts, wanted, runner)
    job.leave_out(list(misfits(skeleton, requests)))
    if wanted.screen and all(request.screen is None for request in job.requests):
        raise ValueError("screen=True: has no effect, no row has a policy that guards")
    if wanted.remake and all(request.policy.suspect is None for request in job.requests):
        raise ValueError(
            "remake=True: has no effect, no row has a policy with `suspect`; `fastguard calibrate` finds its bound"
        )
    for warning in _warnings(job.requests, models.facts(model, settings["scheduler"], settings["dtype"])):
        logger.warning(warning)
    job.refuse()
    return job


def options_for(model: Any, given: JobOptions) -> JobOptions:
    """The options with the policy (a Policy, with their gate) and the guidance scale that the model has where none is given.

    ValueError names the argument that is not allowed.
    """
    chosen = models.chosen_policy(model, given.policy, given.gate)
    scale = models.chosen_scale(model, given.guidance_scale, chosen)
    options = dataclasses.replace(given, policy=chosen, guidance_scale=scale)
    parse({"prompt": "x"}, dataclasses.replace(options, screen=False), 0)  # what a row gets that does not say otherwise
    return options


def model_of(model: Any, options: JobOptions) -> tuple[dict[str, Any], Callable[[], Any], Any]:
    """The settings that records name, how to get the pipeline, and the pipeline without its weights.

    ValueError if there is none, or it makes no images from text alone.
    """
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        kind = None if options.scheduler is None else models.scheduler_class(options.scheduler).__name__
        device, dtype = options.device, options.dtype
        if options.engine == "local":
            device, dtype = models.prepare(device, dtype)
        else:  # the actors have the devices, this machine may have none
            device = ("cuda" if options.gpus_per_actor else "cpu") if device == "auto" else device
            dtype = ("float16" if device.startswith("cuda") else "float32") if dtype == "auto" else dtype
        try:
            _check_class(models.pipeline_class(models.model_index(name)))
        except TypeError as error:
            raise ValueError(f"model={name!r}: {error}") from None
        skeleton = models.skeleton(name, scheduler=kind)
        # Actors have other working directories.
        where = os.path.abspath(name) if os.path.isdir(name) else name
        how: dict[str, Any] = {"dtype": dtype, "scheduler": kind, "variant": options.variant}
        settings, loader = {"model": name, **how}, lambda: models.load_pipeline(where, device=device, **how)
    else:
        for name in ("engine", "dtype", "device", "scheduler", "variant"):
            if (value := getattr(options, name)) != getattr(JobOptions, name):
                raise ValueError(f"{name}={value!r}: needs a model given by name, this one is a pipeline already")
        _check_class(stock_class(type(model)))
        settings = models.facts(model) | {"model": str(getattr(model, "name_or_path", "") or type(model).__name__)}
        loader, skeleton = lambda: model, model
    if (reason := models.distilled(skeleton)) is not None:
        raise ValueError(f"model: {reason}")
    return settings, loader, skeleton


def _check_class(kind: type) -> None:
    """TypeError if the guard does not know the pipeline class, ValueError if it makes no images from text alone."""
    find(kind)
    parameters = inspect.signature(kind.__call__).parameters  # type: ignore[operator]
    if "prompt" not in parameters or "image" in parameters:
        raise ValueError(f"generate needs a text-to-image pipeline, {kind.__name__} is none")


def misfits(pipe: Any, requests: Iterable[Request]) -> Iterator[Problem]:
    """One for each request that a pipeline, of which a skeleton is enough, cannot make."""
    scheduler = copy.deepcopy(pipe.scheduler)
    rows = lru_cache(maxsize=None)(lambda steps: _rows(scheduler, steps))
    multiple = math.lcm(8, int(getattr(pipe, "vae_scale_factor", 8)) * int(getattr(pipe, "patch_size", 1) or 1))
    in_steps = in_training_steps(scheduler)
    for request in requests:
        count, scale = rows(request.steps), request.policy.guidance_scale
        told = None if in_steps else limit_problem(request.policy)
        if isinstance(count, str):
            told = f"steps={request.steps}: {count}"
        elif isinstance(scale, tuple) and len(scale) != count:
            told = (
                f"policy {short(request.policy.name)}: guidance_scale has {len(scale)} values, must have one per denoiser row:"
                f" {count} at steps={request.steps}"
            )
        for name in ("width", "height"):
            if (getattr(request, name) or 0) % multiple:
                told = f"{name}={getattr(request, name)}: must be a multiple of {multiple}"
        if told is not None:
            yield Problem.of(request, told)


def _rows(scheduler: Any, steps: int) -> int | str:
    """Denoiser evaluations of that many steps, or why the scheduler cannot make them."""
    most = scheduler.config.get("num_train_timesteps")
    if most is not None and steps > most:
        return f"must be at most {most}, the timesteps that the model was trained with"
    shift = {"mu": scheduler.config.get("max_shift", 1.0)} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        scheduler.set_timesteps(steps, **shift)
    except Exception as error:
        return f"{type(scheduler).__name__} refuses: {error}"
    return len(scheduler.timesteps)


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
