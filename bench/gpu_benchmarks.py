"""Benchmarks that need a GPU; `python -m bench.gpu` runs them. Each yields results, JSON values, one at a time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import fastguard
from bench import accounts, gpu_own, real_size
from bench.gpu_timing import Result, Results, Work, WrongValues, close, rounds
from bench.test_guided_step import STEPS as ROWS
from bench.test_guided_step import Guided, Stock, same
from fastguard.syncs import probe
from tests import schedulers

SCHEDULERS = ("ddim", "euler", "dpm-2m", "pndm", "unipc-2", "ddpm")
BATCHES = (1, 2, 4, 8, 16, 32)
STEPS = 20  # at batch 1; fewer at larger ones, never under 4: a ratio hardly depends on it, the time on the device does
LOOP = 8  # the largest batch whose whole generation is captured too
COMPILED = (1, 8)  # batches; each takes two compilations of a minute or more
GUARD: dict[str, Any] = {"policy": "og+dtp", "gate": 0.02}  # both branches in every row, as in stock
BUDGET = 48 << 30  # bytes of graphs of one guard: the largest batches' need more than the default


def guided_steps() -> Results:
    """Everything between two denoiser calls, DPM++ 2M, float16 outputs: diffusers' arithmetic and a norm per sample, the fused op.

    Time of 20 steps, launched one by one from Python and replayed from a CUDA graph, and bytes on paper per second of the replay.
    """
    for side in (64, 128):
        for batch in (1, 8, 32):
            stock, guided, anchored = steps(batch, side, torch.device("cuda"))
            moved = sum(
                batch * accounts.fused_bytes(guided.schedule, row, 4 * side * side, torch.float16)
                for row in range(ROWS)
            )
            found = {"latents": [batch, 4, side, side], "launches_per_step": accounts.launches(4 * side * side)}
            works: dict[str, Work] = {"stock": stock, "fused": guided, "fused, anchored": anchored}
            eager = rounds(works, most=50, seconds=1)
            replayed = rounds({name: _graph(work) for name, work in works.items()}, most=200, seconds=1)
            rate = moved / replayed["fused"]["ms"]["median"] * 1e3
            yield {**found, "steps": ROWS, "eager": eager, "graph": replayed, "bytes": moved, "bytes_per_second": rate}


def steps(batch: int, side: int, device: torch.device) -> tuple[Stock, Guided, Guided]:
    """On fixed float16 outputs: stock and the op, seen to compute the same (2^-8 of the largest value, as stock rounds to float16), and the
    op with every sample anchored, which computes something else: its values are the business of the tests marked `gpu`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, side, side, generator=generator).to(device)
    outputs = torch.randn(2 * batch, 4, side, side, generator=generator).to(device, torch.float16)
    stock, guided = Stock(x.half(), lambda *_: outputs), Guided(x, lambda *_: outputs, torch.float16)
    stock.scheduler.set_begin_index(0)  # else its first step looks the timestep up, and no graph can hold that wait
    same(stock, guided, 2**-8)
    return stock, guided, Guided(x, lambda *_: outputs, torch.float16, "anchored")


def _graph(work: Work) -> Work:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Work = graph.replay
    return replay


class Way:
    """One way of making the same generation, on a pipeline object of its own: stock, or guarded and captured.

    The first call, under `cfg` where it is guarded, has to give stock's latents; what it takes (capture, compilation) is `first_seconds`.
    """

    def __init__(self, generation: Generation, policy: Mapping[str, Any] | None = None, **options: Any) -> None:
        self.pipe = generation.pipe()
        self.work = functools.partial(generation.run, self.pipe)
        self.guard: Any = None
        begin = time.perf_counter()
        if policy is not None:
            self.guard = fastguard.enable(self.pipe, "cfg", **options)
            self.guard.graphs.budget = BUDGET
        latents = self.work().images.float()
        self.first_seconds = time.perf_counter() - begin
        self.difference = generation.difference(latents)
        if policy is not None:
            fastguard.enable(self.pipe, **policy, **options)
            self.work()

    def describe(self) -> Result:
        found: Result = {"difference": self.difference, "first_seconds": self.first_seconds}
        if self.guard is not None:
            report, graphs = self.guard.report, self.guard.graphs
            found |= {"path": report.path, "reason": report.reason, "graph_bytes": graphs.bytes}
            found["capture_seconds"] = sum(info.seconds for info in graphs())
        return found


class Generation:
    """A text-to-image call at real size and random weights, up to the latents; the same noise every time."""

    def __init__(self, size: str, scheduler: str, model: Any, batch: int, count: int, device: str = "cuda") -> None:
        self.made = real_size.pipeline(size, schedulers.SD[scheduler](), model)
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        some = {
            name: torch.randn(v.shape, generator=generator) for name, v in probe.example_arguments(self.made).items()
        }
        some["latents"] = torch.randn(batch, 4, *[model.config.sample_size] * 2, generator=generator)
        moved = {name: value.to(self.device, model.dtype) for name, value in some.items()}
        self.arguments: dict[str, Any] = {
            **moved,
            "num_images_per_prompt": batch,
            "num_inference_steps": count,
            "output_type": "latent",
        }
        self.expected: torch.Tensor | None = None

    def pipe(self) -> Any:
        """Another object over the same model, which believes to be where the model is."""
        return probe.copy_of(self.made, probe.Stream(), self.device)

    def run(self, pipe: Any) -> Any:
        return pipe(**self.arguments, generator=torch.Generator(self.device).manual_seed(0))

    def difference(self, latents: torch.Tensor) -> float:
        """From the first latents that were shown, relative to their largest value; beyond what float16 explains: WrongValues."""
        if self.expected is None:
            self.expected = latents
        return close(((latents - self.expected).abs().max() / self.expected.abs().max()).item())


Ways = dict[str, Callable[[], Way]]


def compare(make: Ways, **timing: Any) -> list[Result]:
    """Every way, checked and timed by turns; what gives wrong values or finds no memory says so. The first is what the others are compared to."""
    ways: dict[str, Way] = {}
    without: list[Result] = []
    for how, made in make.items():
        try:
            ways[how] = made()
        except torch.OutOfMemoryError as error:
            without.append({"how": how, "reason": str(error).splitlines()[0]})
        except WrongValues as error:
            without.append({"how": how, "wrong": str(error)})
    timed = rounds({how: way.work for how, way in ways.items()}, **timing)
    found = [{"how": how, **timed[how], **way.describe()} for how, way in ways.items()]
    for way in ways.values():
        if way.guard is not None:
            way.guard.disable()
    return found + without


def generations() -> Results:
    """20 steps of SD 1.5 at batch 1, random weights: time per generation (latents) of each scheduler, stock, guarded and captured."""
    model = _random(real_size.unet("SD 1.5"))
    for name in SCHEDULERS:
        generation = Generation("SD 1.5", name, model, 1, STEPS)
        make: Ways = {"stock": functools.partial(Way, generation)}
        for mode in ("off", "step"):
            make[f"og+dtp, capture={mode}"] = functools.partial(Way, generation, GUARD, capture=mode)
        for found in compare(make):
            yield {"size": "SD 1.5", "scheduler": name, "batch": 1, "steps": STEPS, **found}


def captures(sizes: Sequence[str] = real_size.SIZES, batches: Sequence[int] = BATCHES) -> Results:
    """Euler, random weights, batch 1 to 32, time per generation (latents): stock, and guarded under every capture mode."""
    for size in sizes:
        model = _random(real_size.unet(size))
        for batch in batches:
            count = max(4, STEPS // batch)
            make = capture_modes(Generation(size, "euler", model, batch, count), loop=batch <= LOOP)
            for found in compare(make, least=2):
                yield {"size": size, "batch": batch, "steps": count, **found}
            torch.cuda.empty_cache()


def capture_modes(generation: Generation, *, loop: bool) -> Ways:
    make: Ways = {"stock": functools.partial(Way, generation)}
    for mode in ("off", "step", *(["loop"] if loop else [])):
        make[f"og+dtp, capture={mode}"] = functools.partial(Way, generation, GUARD, capture=mode)
    for policy in ("stp", "anchored"):
        make[f"{policy}, capture=step"] = functools.partial(Way, generation, {"policy": policy}, capture="step")
    return make


def compiled(sizes: Sequence[str] = real_size.SIZES, batches: Sequence[int] = COMPILED) -> Results:
    """Euler, random weights: stock under torch.compile reduce-overhead, and our capture of a compiled denoiser."""
    for size in sizes:
        model = _random(real_size.unet(size))
        for batch in batches:
            count = max(4, STEPS // batch)
            for found in compare(compiled_modes(Generation(size, "euler", model, batch, count))):
                yield {"size": size, "batch": batch, "steps": count, **found}
            torch._dynamo.reset()


def compiled_modes(generation: Generation) -> Ways:
    def peer() -> Way:
        stock = generation.made.unet
        generation.made.unet = torch.compile(stock, mode="reduce-overhead", dynamic=False)
        try:
            way = Way(generation)
        finally:
            generation.made.unet = stock
        for _ in range(2):  # it records its graphs in the second call
            way.work()
        return way

    return {
        "stock": functools.partial(Way, generation),
        "stock, torch.compile reduce-overhead": peer,
        "og+dtp, capture=step, compile": functools.partial(
            Way, generation, GUARD, capture="step", compile={"dynamic": False}
        ),
    }


def _random(model: Any) -> Any:
    """The model on the GPU with weights as torch initialises them: its outputs mean nothing and depend on every input."""
    model = model.to_empty(device="cuda")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def synchronisations() -> Results:
    """What torch's sync debug mode and the operations say of each scheduler's loop on this GPU, stock and guarded (testbed-sized model)."""
    from tests import pipelines

    for name, make in schedulers.SD.items():
        pipe = pipelines.sd(scheduler=make()).to("cuda")
        yield {"scheduler": name, **fastguard.find_syncs(pipe).to_dict()}
        with fastguard.enable(pipe, "cfg"):
            yield {"scheduler": name, **fastguard.find_syncs(pipe).to_dict()}


Benchmark = Callable[..., Results]
BENCHMARKS: dict[str, Benchmark] = {
    "guided_step": guided_steps,
    "generations": generations,
    "captures": captures,
    "compiled": compiled,
    "own_combination": gpu_own.own_combination,
    "synchronisations": synchronisations,
}
SIZED = ("captures", "compiled")  # those that take sizes and batches
