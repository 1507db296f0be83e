"""Benchmarks that need a GPU; `python -m bench.gpu` runs them. Each yields results, JSON values, one at a time."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch

import fastguard
from bench import accounts, real_size
from bench.test_guided_step import STEPS as ROWS
from bench.test_guided_step import Guided, Stock, same
from fastguard.syncs import probe
from tests import schedulers

SCHEDULERS = ("ddim", "euler", "dpm-2m", "pndm", "unipc-2", "ddpm")
BATCHES = (1, 2, 4, 8, 16, 32)
STEPS = {"SD 1.5": 20, "SDXL": 10}  # of Euler; ratios do not depend on it, the time on the device does
COMPILED = {"SD 1.5": (1, 8), "SDXL": (1,)}  # batches; each compilation takes a minute or two
GUARD: dict[str, Any] = {"policy": "og+dtp", "gate": 0.02}  # both branches in every row, as in stock
# Of the largest value: stock rounds its latents to float16 (2^-11) after each of up to 20 steps, ours are float32.
CLOSE = 0.02

Result = dict[str, Any]


def milliseconds(
    work: Callable[[], object], *, least: int = 3, most: int = 20, seconds: float = 1.5, warmup: int = 1
) -> Result:
    """Median and quartiles of device time, by events around each call; at least `least` calls, then as many as `seconds` allow."""
    for _ in range(warmup):
        work()
    torch.cuda.synchronize()
    times: list[float] = []
    end_at = time.monotonic() + seconds
    while len(times) < least or (len(times) < most and time.monotonic() < end_at):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "samples": len(times)}


def guided_steps() -> Iterator[Result]:
    """Everything between two denoiser calls, DPM++ 2M, float16 outputs: diffusers' arithmetic and a norm per sample, the fused op.

    Time per step of 20, launched one by one from Python and replayed from a CUDA graph, and bytes on paper per second of the replay.
    """
    for side in (64, 128):
        for batch in (1, 8, 32):
            stock, guided = steps(batch, side, torch.device("cuda"))
            moved = statistics.mean(
                batch * accounts.fused_bytes(guided.schedule, row, 4 * side * side, torch.float16)
                for row in range(ROWS)
            )
            found = {"launches": accounts.launches(4 * side * side), "bytes": moved}
            for name, work in {"stock": stock, "fused": guided}.items():
                found[name] = _per_step(milliseconds(work))
                found[f"{name}_graph"] = _per_step(milliseconds(_graph(work)))
            found["ratio"] = found["fused"]["median_ms"] / found["stock"]["median_ms"]
            found["ratio_graph"] = found["fused_graph"]["median_ms"] / found["stock_graph"]["median_ms"]
            found["bytes_per_second"] = moved / found["fused_graph"]["median_ms"] * 1e3
            yield {"latents": [batch, 4, side, side], **found}


def steps(batch: int, side: int, device: torch.device) -> tuple[Stock, Guided]:
    """Both on fixed float16 outputs, after they were seen to compute the same: 2^-8 of the largest value, as stock rounds to float16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, side, side, generator=generator).to(device)
    outputs = torch.randn(2 * batch, 4, side, side, generator=generator).to(device, torch.float16)
    stock, guided = Stock(x.half(), lambda *_: outputs), Guided(x, lambda *_: outputs, dtype=torch.float16)
    stock.scheduler.set_begin_index(
        0
    )  # else its first step looks the timestep up, which waits, and no graph can hold that
    same(stock, guided, 2**-8)
    return stock, guided


def _per_step(timed: Result) -> Result:
    return {name: value / ROWS if name.endswith("_ms") else value for name, value in timed.items()}


def _graph(work: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def generations() -> Iterator[Result]:
    """20 steps of SD 1.5 at batch 1, random weights: device time per generation (latents) of each scheduler, stock, guarded and captured."""
    model = _random(real_size.unet("SD 1.5"))
    for name in SCHEDULERS:
        pipe, work = _generation("SD 1.5", name, model, 1, 20)
        found: Result = {"size": "SD 1.5", "scheduler": name, "batch": 1, "steps": 20, "stock": milliseconds(work)}
        for mode in ("off", "step"):
            with fastguard.enable(pipe, **GUARD, capture=mode):
                found[mode] = milliseconds(work, warmup=2)
            found[f"ratio_{mode}"] = found[mode]["median_ms"] / found["stock"]["median_ms"]
        yield found


def captures() -> Iterator[Result]:
    """Euler, random weights, batch 1 to 32, device time per generation (latents): stock, and guarded under every capture mode."""
    for size in real_size.SIZES:
        model = _random(real_size.unet(size))
        for batch in BATCHES:
            pipe, work = _generation(size, "euler", model, batch, STEPS[size])
            found = {"size": size, "batch": batch, "steps": STEPS[size]}
            with closing(capture_modes(pipe, work)) as ways:
                yield from ({**found, **way} for way in ways)


def capture_modes(pipe: Any, work: Callable[[], Any]) -> Iterator[Result]:
    """A generation in each way of running it; what a device has no memory for says so."""
    stock = _timed("stock", work)
    yield stock
    expected = work().images
    for mode in ("off", "step", "loop"):
        with fastguard.enable(pipe, "cfg", capture=mode) as guard:
            difference = _difference(work, expected)
            fastguard.enable(pipe, **GUARD, capture=mode)
            timed = _timed(f"{GUARD['policy']}, capture={mode}", work, guard, stock)
            yield {**timed, "difference": difference}
            if mode == "step":
                fastguard.enable(pipe, "stp", capture=mode)
                yield _timed("stp, capture=step", work, guard, stock)


def compiled() -> Iterator[Result]:
    """Euler, random weights: stock under torch.compile reduce-overhead, and our capture of a compiled denoiser."""
    for size, batches in COMPILED.items():
        model = _random(real_size.unet(size))
        for batch in batches:
            pipe, work = _generation(size, "euler", model, batch, STEPS[size])
            for result in compiled_modes(pipe, work):
                yield {"size": size, "batch": batch, "steps": STEPS[size], **result}


def compiled_modes(pipe: Any, work: Callable[[], Any]) -> Iterator[Result]:
    stock = _timed("stock", work)
    yield stock
    expected = work().images
    unet = pipe.unet
    begin = time.perf_counter()
    pipe.unet = torch.compile(unet, mode="reduce-overhead", dynamic=False)
    try:
        difference = _difference(work, expected)
        timed = _timed("stock, torch.compile reduce-overhead", work, relative_to=stock, warmup=3)
        yield {**timed, "difference": difference, "with_compilation_seconds": time.perf_counter() - begin}
    finally:
        pipe.unet = unet
        torch._dynamo.reset()
    begin = time.perf_counter()
    with fastguard.enable(pipe, "cfg", capture="step", compile={"dynamic": False}) as guard:
        difference = _difference(work, expected)
        fastguard.enable(pipe, **GUARD, capture="step", compile={"dynamic": False})
        timed = _timed(f"{GUARD['policy']}, capture=step, compile", work, guard, stock, warmup=2)
        yield {**timed, "difference": difference, "with_compilation_seconds": time.perf_counter() - begin}
    torch._dynamo.reset()


def _timed(
    how: str, work: Callable[[], object], guard: Any = None, relative_to: Result | None = None, warmup: int = 1
) -> Result:
    try:
        found: Result = {"how": how, **milliseconds(work, warmup=warmup)}
    except torch.OutOfMemoryError as error:
        return {"how": how, "reason": str(error).splitlines()[0]}
    if relative_to is not None and "median_ms" in relative_to:
        found["ratio"] = found["median_ms"] / relative_to["median_ms"]
    if guard is not None:
        found |= {"path": guard.report.path, "reason": guard.report.reason, "graph_bytes": guard.graphs.bytes}
        found["capture_seconds"] = sum(info.seconds for info in guard.graphs())
    return found


def _difference(work: Callable[[], Any], expected: torch.Tensor) -> float:
    """From stock's latents, relative to their largest value. AssertionError beyond what float16 explains: nothing is timed then."""
    found = ((work().images.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    assert found <= CLOSE, f"latents differ from stock's by {found:.2g} of the largest value, allowed: {CLOSE:g}"
    return found


def _generation(size: str, scheduler: str, model: Any, batch: int, count: int) -> tuple[Any, Callable[[], Any]]:
    """A pipeline that believes to be on the GPU as its UNet is, and a call of it that draws the same noise every time."""
    pipe = real_size.pipeline(size, schedulers.SD[scheduler](), model)
    generator = torch.Generator().manual_seed(0)
    arguments = {
        name: torch.randn(value.shape, generator=generator).to("cuda", value.dtype)
        for name, value in probe.example_arguments(pipe).items()
    }
    latents = torch.randn(batch, 4, *[model.config.sample_size] * 2, generator=generator).to("cuda", torch.float16)
    arguments |= {"latents": latents, "num_images_per_prompt": batch}
    twin = probe.copy_of(pipe, probe.Stream(), torch.device("cuda"))
    call = functools.partial(twin, **arguments, num_inference_steps=count, output_type="latent")

    def work() -> Any:
        return call(generator=torch.Generator("cuda").manual_seed(0))

    return twin, work


def _random(model: Any) -> Any:
    """The model on the GPU with weights as torch initialises them: its outputs mean nothing and depend on every input."""
    model = model.to_empty(device="cuda")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def synchronisations() -> Iterator[Result]:
    """What torch's sync debug mode and the operations say of each scheduler's loop on this GPU, stock and guarded (testbed-sized model)."""
    from tests import pipelines

    for name, make in schedulers.SD.items():
        pipe = pipelines.sd(scheduler=make()).to("cuda")
        yield {"scheduler": name, **fastguard.find_syncs(pipe).to_dict()}
        with fastguard.enable(pipe, "cfg"):
            yield {"scheduler": name, **fastguard.find_syncs(pipe).to_dict()}


BENCHMARKS: dict[str, Callable[[], Iterator[Result]]] = {
    "guided_step": guided_steps,
    "generations": generations,
    "captures": captures,
    "compiled": compiled,
    "synchronisations": synchronisations,
}
