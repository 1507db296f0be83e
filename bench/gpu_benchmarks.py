"""Benchmarks that need a GPU; `python -m bench.gpu` runs them. Each is a function without arguments that returns JSON values."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

import fastguard
from bench import accounts, real_size
from fastguard.kernels.guided_step import guided_step, history_for, scratch_for
from fastguard.policy import lower, policy
from fastguard.syncs import probe
from tests import schedulers

SCHEDULERS = ("ddim", "euler", "dpm-2m", "pndm", "unipc-2", "ddpm")
SAMPLES = 50
BATCHES = (1, 2, 4, 8, 16, 32)


def milliseconds(work: Callable[[], object], samples: int = SAMPLES, warmup: int = 5) -> dict[str, float]:
    """Median and quartiles of device time, by events around each call."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median_ms": middle, "q1_ms": low, "q3_ms": high, "samples": samples}


def guided_steps() -> list[dict[str, Any]]:
    """The fused op alone, DPM++ 2M, float16: time, and bytes on paper per second."""
    results = []
    for side in (64, 128):
        for batch in (1, 8, 64):
            work, bytes_moved = _guided_step(batch, side)
            timed = milliseconds(work)
            rate = bytes_moved / timed["median_ms"] * 1e3
            results.append(
                {
                    "latents": [batch, 4, side, side],
                    "launches": accounts.launches(4 * side * side),
                    **timed,
                    "bytes": bytes_moved,
                    "bytes_per_second": rate,
                }
            )
    return results


def _guided_step(batch: int, side: int) -> tuple[Callable[[], object], int]:
    """One step in the middle of a run, repeated: the step counters are put back before each."""
    schedule = accounts.table(schedulers.SD["dpm-2m"](), 20)
    plan = lower(
        policy("dtp").samples(batch),
        timesteps=schedule.timesteps,
        observe=[True] * len(schedule.timesteps),
        guidance_scale=7.5,
        elements=4 * side * side,
    )
    x = torch.randn(batch, 4, side, side, device="cuda")
    outputs = torch.randn(2 * batch, 4, side, side, device="cuda", dtype=torch.float16)
    row = 10
    state = plan.state.cuda()
    state[:, 0] = row
    start = state.clone()
    buffers: dict[str, Any] = {
        "x": x,
        "history": history_for(x, schedule.history),
        "model_input": outputs.clone(),
        "trace": torch.zeros(len(schedule.timesteps), batch, device="cuda"),
        "state": state,
        "rows": schedule.rows.cuda(),
        "rules": plan.rules.cuda(),
        "guidance": plan.guidance.cuda(),
        "scratch": scratch_for(x),
    }

    def work() -> None:
        state.copy_(start)  # a small kernel of its own, in the time
        guided_step(*outputs.chunk(2), **buffers)

    return work, batch * accounts.fused_bytes(schedule, row, 4 * side * side, torch.float16)


def generations() -> list[dict[str, Any]]:
    """20 steps of SD 1.5 and SDXL at real size with random weights, stock and guarded: device time per generation, decoding left out."""
    results = []
    for size in real_size.SIZES:
        model = _random(real_size.unet(size))
        for name in SCHEDULERS:
            pipe = real_size.pipeline(size, schedulers.SD[name](), model)
            arguments = {k: v.cuda() for k, v in probe.example_arguments(pipe).items()}
            arguments |= {"num_inference_steps": 20, "output_type": "latent", "generator": torch.Generator("cuda")}
            twin = probe.copy_of(pipe, probe.Stream(), torch.device("cuda"))
            work = functools.partial(twin, **arguments)
            stock = milliseconds(work, samples=10, warmup=2)
            with fastguard.enable(twin, "dtp"):
                guarded = milliseconds(work, samples=10, warmup=2)
            ratio = guarded["median_ms"] / stock["median_ms"]
            results.append({"size": size, "scheduler": name, "stock": stock, "guarded": guarded, "ratio": ratio})
        del model
        torch.cuda.empty_cache()
    return results


def captures() -> list[dict[str, Any]]:
    """20 steps of Euler, random weights, batch 1 to 32: stock, reduce-overhead, and guarded under every capture mode."""
    results = []
    for size in real_size.SIZES:
        model = _random(real_size.unet(size))
        for batch in BATCHES:
            pipe = real_size.pipeline(size, schedulers.SD["euler"](), model)
            arguments = {k: v.cuda() for k, v in probe.example_arguments(pipe).items()}
            arguments |= {"num_inference_steps": 20, "output_type": "latent", "num_images_per_prompt": batch}
            twin = probe.copy_of(pipe, probe.Stream(), torch.device("cuda"))
            results += [{"size": size, "batch": batch, **timed} for timed in capture_modes(twin, arguments)]
        del model
        torch.cuda.empty_cache()
    return results


def capture_modes(pipe: Any, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """One call of a pipeline in each way of running it; what a device has no memory for says so."""
    work = functools.partial(pipe, **arguments)

    def timed(how: str, guard: Any = None) -> dict[str, Any]:
        try:
            found: dict[str, Any] = {"how": how, **milliseconds(work, samples=10, warmup=3)}
        except torch.OutOfMemoryError as error:
            return {"how": how, "reason": str(error).splitlines()[0]}
        if guard is not None:
            found |= {"path": guard.report.path, "reason": guard.report.reason, "graph_bytes": guard.graphs.bytes}
            found["capture_seconds"] = sum(info.seconds for info in guard.graphs())
        return found

    results = [timed("stock")]
    for mode in ("off", "step", "loop"):
        with fastguard.enable(pipe, "og+dtp", gate=0.02, capture=mode) as guard:
            results.append(timed(f"capture={mode}", guard))
    stock = pipe.unet
    pipe.unet = torch.compile(stock, mode="reduce-overhead")
    try:
        results.append(timed("stock, torch.compile reduce-overhead"))
    finally:
        pipe.unet = stock
    return results


def _random(model: Any) -> Any:
    """The model on the GPU with small random weights: only its time matters."""
    model = model.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def synchronisations() -> list[dict[str, Any]]:
    """What torch's sync debug mode and the operations say of each scheduler's loop on this GPU, stock and guarded (testbed-sized model)."""
    from tests import pipelines

    results = []
    for name, make in schedulers.SD.items():
        pipe = pipelines.sd(scheduler=make()).to("cuda")
        results.append({"scheduler": name, **fastguard.find_syncs(pipe).to_dict()})
        with fastguard.enable(pipe, "cfg"):
            results.append({"scheduler": name, **fastguard.find_syncs(pipe).to_dict()})
    return results


BENCHMARKS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "guided_step": guided_steps,
    "generations": generations,
    "captures": captures,
    "synchronisations": synchronisations,
}
