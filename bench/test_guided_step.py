"""The guided step on the CPU against diffusers' own arithmetic between two denoiser calls, DPM++ 2M, float32.

    python -m pytest bench/test_guided_step.py --benchmark-only

Stock: chunk, u + g (c - u), scheduler.step, cat, scale_model_input, and what an eager guard needs on top, one norm per sample. No
host-side preparation is timed on either side (set_timesteps; compiling the schedule). Threads: OMP_NUM_THREADS or torch's default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from bench.pairs import alternating
from fastguard.kernels.arguments import Operands
from fastguard.kernels.guided_step import guided_step, history_for, scratch_for
from fastguard.policies.plan import lower
from fastguard.policies.presets import policy
from fastguard.schedules.compiler import compile_schedule

SHAPES = [(8, 4, 32, 32), (16, 4, 64, 64)]
STEPS = 20


def scheduler(device: torch.device | str = "cpu") -> DPMSolverMultistepScheduler:
    made = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    made.set_timesteps(STEPS, device=device)
    return made


Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # model input [2B, C, H, W] and t -> outputs, u before c


class Stock:
    """STEPS steps of diffusers' arithmetic around `denoise`."""

    def __init__(self, x: torch.Tensor, denoise: Denoise) -> None:
        self.start, self.denoise, self.scheduler = x, denoise, scheduler(x.device)
        self.timesteps = self.scheduler.timesteps
        self.norms: list[torch.Tensor] = []

    def __call__(self) -> torch.Tensor:
        made, x, self.norms = self.scheduler, self.start, []
        # What set_timesteps would reset.
        made.model_outputs = [None] * made.config.solver_order
        made.lower_order_nums, made._step_index = 0, None
        model_input = torch.cat([x] * 2)
        for t in self.timesteps:
            u, c = self.denoise(model_input, t).chunk(2)
            e = u + 7.5 * (c - u)
            self.norms.append((c - u).float().flatten(1).norm(dim=1))
            x = made.step(e, t, x).prev_sample
            model_input = made.scale_model_input(torch.cat([x] * 2), t)
        return model_input


class Guided:
    """The same through the guided step, with the rule of `dtp` deciding for every sample; or "anchored", which gives other values."""

    def __init__(
        self, x: torch.Tensor, denoise: Denoise, dtype: torch.dtype = torch.float32, preset: str = "dtp"
    ) -> None:
        batch, device = x.shape[0], x.device
        schedule = self.schedule = compile_schedule(scheduler())
        rule = policy(preset, before=7.5) if preset == "dtp" else policy(preset)
        plan = lower(rule.samples(batch), schedule, 7.5, x[0].numel())
        self.start, self.first, self.denoise = x, plan.state.to(device), denoise
        self.timesteps = scheduler(device).timesteps
        self.buffers: dict[str, Any] = {
            "x": x.clone(),
            "history": history_for(x, schedule.history),
            "model_input": torch.cat([x] * 2).to(dtype),
            "trace": torch.zeros(STEPS, batch, device=device),
            "state": self.first.clone(),
            "rows": schedule.rows.to(device),
            "rules": plan.rules.to(device),
            "guidance": plan.guidance.to(device),
            "scratch": scratch_for(x),
        }
        if rule.anchored:
            self.buffers |= {"anchor": history_for(x, 2), "shares": torch.zeros_like(self.buffers["trace"])}

    def __call__(self) -> torch.Tensor:
        self.buffers["x"].copy_(self.start)
        self.buffers["state"].copy_(self.first)
        self.buffers["model_input"].unflatten(0, (2, -1)).copy_(self.start)
        for t in self.timesteps:
            u, c = self.denoise(self.buffers["model_input"], t).chunk(2)
            guided_step(Operands(u, c, **self.buffers))
        return self.buffers["model_input"]


def peers(shape: tuple[int, ...]) -> tuple[Stock, Guided]:
    """Both on fixed outputs, after they were seen to compute the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    outputs = torch.randn((2 * shape[0], *shape[1:]), generator=generator)
    stock, guided = Stock(x, lambda *_: outputs), Guided(x, lambda *_: outputs)
    same(stock, guided, 1e-5)
    torch.testing.assert_close(guided.buffers["trace"].sqrt(), torch.stack(stock.norms))
    return stock, guided


def same(stock: Stock, guided: Guided, tolerance: float) -> None:
    """The last model input, `tolerance` of its largest value, of a first call and of a second."""
    want = stock()
    for _ in range(2):
        torch.testing.assert_close(guided(), want, rtol=0, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stock(benchmark, shape):
    benchmark.group = f"arithmetic of {STEPS} steps, {shape}"
    benchmark(peers(shape)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guided(benchmark, shape):
    benchmark.group = f"arithmetic of {STEPS} steps, {shape}"
    benchmark(peers(shape)[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ratio(benchmark, capsys, shape):
    """Alternating pairs, as the machine may be busy. Reported, not judged."""
    stock, guided = peers(shape)
    ratios = benchmark.pedantic(alternating, (guided, stock), {"pairs": 20}, rounds=1)
    benchmark.extra_info.update(pair=f"guided step / stock's arithmetic, {shape}", ratios=ratios.values)
    with capsys.disabled():
        print(f"\nguided step / stock at {shape}, {torch.get_num_threads()} threads: {ratios}")
