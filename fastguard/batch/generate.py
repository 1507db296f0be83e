"""Images from prompts into a directory: from a prompt file or a list, on one device or many, resumable.

    import fastguard

    summary = fastguard.generate("path/or/id", "prompts.csv", "out", policy="dtp", gate=0.03)

manifest.jsonl in the directory has one line per finished image and says all that is known of it. The same call again makes only
what is missing. See docs/generate.md and docs/ray.md; the machinery is in `fastguard.batch`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastguard import checks
from fastguard.batch.fitting import Limits, guard_disabled
from fastguard.batch.job import Interrupted, Job, Runner, Summary
from fastguard.batch.local import LocalRunner
from fastguard.batch.pictures import Picture
from fastguard.batch.prompt_files import BadRows, Problem, Prompts, Source, load
from fastguard.batch.request import FIELDS, Defaults, Request, integer
from fastguard.pipelines import loading as models
from fastguard.policies.policy import Policy
from fastguard.policies.presets import DEFAULT
from fastguard.policies.presets import policy as make_policy

__all__ = ["FIELDS", "BadRows", "Interrupted", "Problem", "Request", "Summary", "Task", "generate", "prepare"]

logger = logging.getLogger("fastguard")

DTYPES = ("auto", "float32", "float16", "bfloat16")
ENGINES = ("local", "ray")
MOST_WORKERS = 1000


def generate(
    model: Any, prompts: Prompts, out: str | os.PathLike[str], *, progress: bool = True, **options: Any
) -> Summary:
    """Make the images of `prompts` in the directory `out`; those that are there already are kept. All options are `prepare`'s.

    Raises what `prepare` raises before anything is done; afterwards `Interrupted` (SIGTERM, SIGINT), OSError (disk full) or the
    error of an image: what the manifest lists by then is done, and the same call goes on from there.
    """
    with prepare(model, prompts, out, **options).open() as task:
        return task.run(progress=progress)


def prepare(
    model: Any,
    prompts: Prompts,
    out: str | os.PathLike[str],
    *,
    policy: str | os.PathLike[str] | Policy = DEFAULT,
    gate: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float | None = None,
    width: int | None = None,
    height: int | None = None,
    images_per_prompt: int = 1,
    batch_size: int = 8,
    format: str = "png",
    quality: int = 95,
    shard_size: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    scheduler: str | None = None,
    keep_going: bool = False,
    workers: int | None = None,
    engine: str = "local",
    actors: int = 1,
    cpus_per_actor: float = 1.0,
    gpus_per_actor: float = 0.0,
    ray_address: str | None = None,
) -> Task:
    """A batch job, checked: every prompt, the model's configuration and the directory. Loads no weights and writes nothing.

    model             directory or hub id of a text-to-image pipeline; a pipeline (local engine only), used as it is
    prompts           file (.txt, .csv, .jsonl, .parquet), or a list of prompts or of mappings with the fields `FIELDS`
    policy ... images_per_prompt   for rows that do not say otherwise, see `fastguard.batch.request.Defaults`
    batch_size        images per call of the pipeline; halved whenever memory is short
    format, quality   png, jpeg or webp; quality of the latter two, 1 to 100
    shard_size        write WebDataset shards of so many images; None: a file per image, named by its id
    dtype, device, scheduler   of a model given by name. auto: a GPU with float16 if there is one, otherwise the CPU with float32
    keep_going        leave out bad rows and images that fail, and list them in rejected.jsonl; otherwise they are refused
    workers           threads that encode and write images
    engine            "local", or "ray": `actors` processes with a model each, on `cpus_per_actor` CPUs and `gpus_per_actor` GPUs
    ray_address       of a running cluster; None: a local one is started for the job

    BadRows (a ValueError; `problems` has the lines) for bad rows, ValueError for another argument that is not allowed,
    OSError for a file that cannot be read, TypeError for a pipeline that the guard does not know.
    """
    checks.choice("engine", engine, ENGINES)
    checks.choice("dtype", dtype, DTYPES)
    if workers is not None:
        integer("workers", workers, 1, MOST_WORKERS)
    picture = Picture(format, quality)
    defaults = Defaults(
        policy=make_policy(policy),
        gate=gate,
        negative_prompt=negative_prompt,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        width=width,
        height=height,
        images_per_prompt=images_per_prompt,
    )
    requests, problems = load(prompts, defaults, keep_going=keep_going)
    settings, loader, limits = _model(model, dtype, device, scheduler, engine, gpus_per_actor)
    if guard_disabled():
        settings["guard"] = "disabled"  # such images are not to be taken for guarded ones later
    job = Job(
        requests, Path(out), settings=settings, source=Source.of(prompts), batch_size=batch_size, picture=picture, shard_size=shard_size,
        keep_going=keep_going, problems=problems,
    )  # fmt: skip
    job.fit(limits)
    if warning := Policy.stack(list(dict.fromkeys(request.policy for request in job.requests))).ungated_warning():
        logger.warning(warning)
    common: dict[str, Any] = {"settings": settings, "picture": picture, "keep_going": keep_going}

    if engine == "local":

        def runner() -> Runner:
            return LocalRunner(loader(), workers=workers, **common)

        return Task(job, runner)

    from fastguard.batch.ray_runner import RayRunner

    ray = RayRunner(loader, actors=actors, cpus=cpus_per_actor, gpus=gpus_per_actor, address=ray_address, **common)
    return Task(job, lambda: ray)


class Task:
    """A checked job. `open` makes its directory ours; `run`, inside it, loads the model if an image is missing, and works."""

    def __init__(self, job: Job, runner: Callable[[], Runner]) -> None:
        self.job, self._runner = job, runner
        job.refuse()

    @contextmanager
    def open(self) -> Iterator[Task]:
        """Only from here on something is written. ValueError if another process works in the directory."""
        with self.job.open():
            yield self

    def run(self, *, progress: bool = True) -> Summary:
        return self.job.run(self._runner, progress=progress)


def _model(
    model: Any, dtype: str, device: str, scheduler: str | None, engine: str, gpus: float
) -> tuple[dict[str, Any], Callable[[], Any], Limits]:
    """The settings that records name, how to get the pipeline, and what it allows."""
    if not isinstance(model, (str, os.PathLike)):
        if engine != "local" or (dtype, device, scheduler) != ("auto", "auto", None):
            raise ValueError("model: is a pipeline already; engine, dtype, device and scheduler need one given by name")
        name = str(getattr(model, "name_or_path", "") or type(model).__name__)
        settings = {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "scheduler": type(model.scheduler).__name__,
        }
        return settings, lambda: model, Limits.of_pipeline(model)

    name = os.fspath(model)
    kind = None if scheduler is None else models.scheduler_class(scheduler).__name__
    if engine == "ray":  # the actors have the devices, this machine may have none
        device = ("cuda" if gpus else "cpu") if device == "auto" else device
        on_gpu = device.startswith("cuda")
        kept = ("float16" if on_gpu else "float32") if dtype == "auto" else dtype
    else:
        device, kept = models.prepare(device, dtype)
    loader = functools.partial(_load, name, dtype=kept, device=device, scheduler=kind)
    named: dict[str, Any] = {"model": name, "dtype": kept, "scheduler": kind}
    return named, loader, Limits.of_model(name, kind)


def _load(name: str, **options: Any) -> Any:
    """The pipeline; looked up when it is called, in an actor too."""
    return models.load_pipeline(name, **options)
