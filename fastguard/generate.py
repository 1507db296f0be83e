"""Images from a list of prompts into a directory, resumable: every image is made once, and one that is there is complete.

The PNG itself is the record: its text chunks hold the prompt, the seed, the policy and the report of that image, so a run that was
killed loses nothing, and report.json is only a summary of the files. Image n of a prompt uses seed + n whatever its batch.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastguard import checks
from fastguard.files import finite, read_json, write_atomic, write_json
from fastguard.models import DTYPES
from fastguard.policy import Policy
from fastguard.report import ImageReport

SETTINGS, REPORT = "settings.json", "report.json"
CHUNK = "fastguard"  # text chunk with all that is known of an image, as JSON


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to make. Everything but out, batch_size and device decides what the images look like.

    guidance_scale, negative_prompt, scheduler: None is the pipeline's own. ValueError names the argument that is not allowed.
    """

    model: str
    policy: Policy
    prompts: tuple[str, ...]
    out: Path
    negative_prompt: str | None = None
    seed: int = 0
    steps: int = 50
    guidance_scale: float | None = None
    images_per_prompt: int = 1
    batch_size: int = 1
    dtype: str = "float32"
    scheduler: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: there are none; give at least one")
        empty = [i for i, prompt in enumerate(self.prompts) if not prompt.strip()]
        if empty:
            raise ValueError(f"prompts: number {empty[0] + 1} is empty")
        checks.integer("seed", self.seed, 0)
        if self.seed + self.images_per_prompt > 2**63:
            raise ValueError(f"seed={self.seed}: must be below 2**63")
        for name in ("steps", "images_per_prompt", "batch_size"):
            checks.integer(name, getattr(self, name), 1)
        checks.choice("dtype", self.dtype, DTYPES)
        if checks.common_length(vars(self.policy)) is not None:
            raise ValueError("policy: per-image lists are not possible here, the batches vary")
        if self.guidance_scale is not None:
            checks.number("guidance_scale", self.guidance_scale, "a finite number")
            if self.policy.guidance_scale is not None:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale}: the policy has its own, {self.policy.guidance_scale};"
                    " give one of them"
                )
            if self.policy.guarded and self.guidance_scale <= 1:
                raise ValueError(
                    f"guidance_scale={self.guidance_scale}: must be above 1 under policy {self.policy.name!r}"
                    " (at or below 1 pipelines run no unconditional branch, so there is nothing to guard)"
                )

    def settings(self) -> dict[str, Any]:
        """What two runs must have in common for one to finish the other."""
        digest = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()
        return {
            "fastguard_settings": 1,
            "model": self.model,
            "policy": self.policy.to_dict(),
            "prompts": {"count": len(self.prompts), "sha256": digest},
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "images_per_prompt": self.images_per_prompt,
            "dtype": self.dtype,
            "scheduler": self.scheduler,
        }

    def tasks(self) -> list[Task]:
        """The images, in order."""
        digits = max(5, len(str(len(self.prompts) - 1)))
        return [
            Task(prompt, seed, self.out / f"{i:0{digits}d}-{seed}.png")
            for i, prompt in enumerate(self.prompts)
            for seed in range(self.seed, self.seed + self.images_per_prompt)
        ]


@dataclass(frozen=True)
class Task:
    prompt: str
    seed: int
    path: Path


@contextmanager
def claim(job: Job) -> Iterator[None]:
    """Make job.out this job's directory for as long as the context lasts.

    ValueError if it holds something else, was made with other settings (the message says which), or another process is using it;
    OSError if it cannot be written.
    """
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"out={job.out}: is a file, must be a directory")
    job.out.mkdir(parents=True, exist_ok=True)
    with _locked(job.out / ".lock"):
        path, wanted = job.out / SETTINGS, job.settings()
        if path.exists():
            differences = list(_differences(read_json(path), wanted))
            if differences:
                raise ValueError(
                    f"out={job.out}: was made with other settings: {'; '.join(differences)}"
                )
        elif any(not entry.name.startswith(".") for entry in job.out.iterdir()):
            raise ValueError(
                f"out={job.out}: is not empty and has no {SETTINGS}; choose another directory"
            )
        for leftover in job.out.glob(".*.tmp"):  # of a killed run: we hold the lock
            leftover.unlink()
        write_json(path, wanted)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes. The system lets go of it when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs into one directory are the user's own risk
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out={path.parent}: another process is writing there") from None
        yield


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {json.dumps(there)} there, {json.dumps(here)} here"


def read_record(task: Task, settings: str) -> dict[str, Any] | None:
    """What the finished image says about itself; None if it is missing, damaged, or not the image of this task and settings."""
    try:
        with Image.open(task.path) as image:
            image.verify()  # the checksums of all chunks
        with Image.open(task.path) as image:
            image.load()
            record = json.loads(image.text[CHUNK])  # type: ignore[attr-defined]
    except (OSError, SyntaxError, KeyError, AttributeError, ValueError):
        return None
    same = record.get("settings"), record.get("prompt"), record.get("seed")
    return record if same == (settings, task.prompt, task.seed) else None


def encode(
    image: Image.Image, job: Job, task: Task, report: ImageReport | None, settings: str
) -> bytes:
    """The PNG of an image with all that is known of it in its text chunks."""
    record = {
        "settings": settings,
        "prompt": task.prompt,
        "seed": task.seed,
        "device": job.device,
        "image": None if report is None else report.to_dict(),
    }
    texts = {
        "prompt": task.prompt,
        "negative_prompt": job.negative_prompt or "",
        "seed": str(task.seed),
        "model": job.model,
        "steps": str(job.steps),
        "scheduler": job.scheduler or "the model's own",
        "guidance_scale": "the pipeline's own"
        if job.guidance_scale is None
        else f"{job.guidance_scale:g}",
        "policy": job.policy.name,
        "gate": "none" if report is None else report.gate_text() or "none",
        "transition": "none" if report is None else report.transition_text() or "none",
        CHUNK: json.dumps(finite(record), allow_nan=False),
    }
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, str(text))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def digest(settings: dict[str, Any]) -> str:
    """A short name of the settings, written into every image."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Summary:
    total: int
    made: int
    report: Path
    caught: int
    transitions: int
    forced: int

    def __str__(self) -> str:
        return (
            f"{self.total} images, {self.made} of them made now; caught by the gate: {self.caught}, transitions: "
            f"{self.transitions}, of them forced by the deadline: {self.forced}"
        )


def run(job: Job, *, progress: bool = True) -> Summary:
    """Make the images of `job` that are not there yet; use it inside `claim(job)`. The model is loaded only if one is missing."""
    from tqdm import tqdm

    settings = digest(job.settings())
    tasks = job.tasks()
    records = {task: read_record(task, settings) for task in tasks}
    todo = [task for task, record in records.items() if record is None]
    if todo:
        from fastguard.enable import enable
        from fastguard.models import load_pipeline

        pipe = load_pipeline(job.model, dtype=job.dtype, device=job.device, scheduler=job.scheduler)
        guard = enable(pipe, job.policy)
        with tqdm(
            total=len(tasks), initial=len(tasks) - len(todo), unit="image", disable=not progress
        ) as bar:
            for start in range(0, len(todo), job.batch_size):
                batch = todo[start : start + job.batch_size]
                images = _call(pipe, job, batch)
                reports = guard.report or [None] * len(batch)
                for task, image, report in zip(batch, images, reports, strict=True):
                    write_atomic(task.path, encode(image, job, task, report, settings))
                    records[task] = read_record(task, settings)
                    bar.update()
    return _summarize(job, records, made=len(todo))


def _call(pipe: Any, job: Job, batch: list[Task]) -> list[Image.Image]:
    import torch

    optional: dict[str, Any] = {}
    if job.guidance_scale is not None:
        optional["guidance_scale"] = job.guidance_scale
    if job.negative_prompt is not None:
        optional["negative_prompt"] = [job.negative_prompt] * len(batch)
    return pipe(
        prompt=[task.prompt for task in batch],
        num_inference_steps=job.steps,
        # On the host: the same noise on every device, and for an image whatever batch it is in.
        generator=[torch.Generator("cpu").manual_seed(task.seed) for task in batch],
        **optional,
    ).images


def _summarize(job: Job, records: dict[Task, dict[str, Any] | None], *, made: int) -> Summary:
    lost = [task.path.name for task, record in records.items() if record is None]
    if lost:
        raise RuntimeError(
            f"out={job.out}: {len(lost)} images cannot be read back, first {lost[0]}"
        )
    images = [{"file": task.path.name, **(record or {})} for task, record in records.items()]
    path = write_json(
        job.out / REPORT, {"fastguard_generate": 1, "settings": job.settings(), "images": images}
    )
    reports = [entry["image"] for entry in images if entry["image"] is not None]
    return Summary(
        total=len(images),
        made=made,
        report=path,
        caught=sum(1 for r in reports if r["gate"] and r["gate"]["caught"]),
        transitions=sum(1 for r in reports if r["transition_step"] is not None),
        forced=sum(1 for r in reports if r["forced"]),
    )
