"""Compile a diffusers scheduler into a table of coefficients, one row per denoiser evaluation.

    m  = P x + Q e;    x' = A x + B m + sum_j H_j history[j] + N z;    history[STORE] = m

The table is not written by hand: the real scheduler is run on basis vectors (`trace`), its coefficients are folded into
the form above (`fold`), and the result is checked against the scheduler's own run on random numbers. A scheduler that is not linear
in sample, model outputs and noise (thresholding, clipping), that needs more than three remembered tensors, or whose own float32
arithmetic loses more than a table would repeat, gets a table that passes the guided output through, and its own step() runs outside
(docs/schedulers.md lists them).
"""

import threading
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastguard.kernels.layout import HISTORY, Row
from fastguard.schedules.fold import fold, free_form
from fastguard.schedules.noise_level import predictions, unknown
from fastguard.schedules.schedule import Schedule, in_training_steps, without_update
from fastguard.schedules.scheduler_state import key_of
from fastguard.schedules.trace import Trace, stock, trace

# Relative to the largest value of x'; beyond them the scheduler's own step() runs.
LARGEST_RESIDUAL = 1e-6
LARGEST_ROUNDING = 6e-7  # two float32 computations of such a row differ by up to the 1e-6 promised against stock
# Of the table from stock in float32: 1e-6 is promised, and a latent has more elements than the probe.
LARGEST_DIFFERENCE = 9e-7
# Shorter runs keep the table, which is nearer to float64 than stock is: their long steps cost stock up to 1.6e-5 (KDPM2, 2 steps).
SHORTEST_COMPARED = 10
CACHED = 64  # schedules kept; one of 50 rows is 7 kB

_cache: dict[tuple, Schedule] = {}
_cache_lock = threading.Lock()


def compile_schedule(scheduler: Any, *, step_kwargs: Mapping[str, Any] | None = None, begin_index: int = 0) -> Schedule:
    """Table of `scheduler`, whose timesteps are set; rows from `begin_index` (or the scheduler's own begin_index) on.

    step_kwargs are the extra arguments that the caller would pass to step() (eta, s_churn, ...); a generator among them is ignored
    and not consumed. A copy of the scheduler is run, itself it is not changed. Results are cached by value, any number of threads may
    call; not those of a scheduler that holds an object whose value nobody can name (a `tau_func` that reads something from outside it).
    """
    arguments = {name: value for name, value in (step_kwargs or {}).items() if name not in ("generator", "return_dict")}
    begin = begin_index or getattr(scheduler, "begin_index", None) or 0
    key = key_of(scheduler, arguments, begin)
    schedule = None if key is None else _cache.get(key)
    if schedule is None:
        schedule = _compile(scheduler, arguments, begin)
        if key is not None:
            with _cache_lock:
                schedule = _cache.setdefault(key, schedule)
                while len(_cache) > CACHED:
                    del _cache[next(iter(_cache))]
    return schedule


@torch.inference_mode(False)  # a cached table outlives the caller's inference mode
@torch.no_grad()
def _compile(scheduler: Any, arguments: Mapping[str, Any], begin: int) -> Schedule:
    # Onto the CPU. A default device is itself a mode: entering the CPU's for nothing would double every scalar's cost.
    with nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu"):
        recorded = trace(scheduler, arguments, begin)
        timesteps = scheduler.timesteps[begin:].detach().to("cpu", copy=True)
        rows = _rows_without_update(scheduler, recorded, timesteps)
        no_x0 = unknown(scheduler, timesteps, recorded.sigma, recorded.starts)
        if no_x0 is not None:
            rows[:-1, Row.X : Row.E + 1] = float("nan")
        reason = _known_reason(scheduler, arguments) or recorded.problem
        full, in_steps = len(scheduler.timesteps), in_training_steps(scheduler)
        own = Schedule(rows, timesteps, reason=reason, in_steps=in_steps, no_x0=no_x0, full=full)
        if reason is not None:
            return own
        try:
            return _with_update(own, recorded)
        except ValueError as error:
            return replace(own, reason=str(error))


def _with_update(own: Schedule, recorded: Trace) -> Schedule:
    """The table, of the first form that repeats what was recorded. ValueError if none does."""
    form, (rows, history, looks_back) = _best_fold(recorded, own.rows)
    residual = _deviation(rows, recorded, recorded.probe_x[1:], np.float64)
    if not residual <= LARGEST_RESIDUAL:
        raise ValueError(f"not linear in sample, output and noise (residual {residual:.1e})")
    rounding = _deviation(rows, recorded, recorded.probe_x[1:], np.float32)
    if not rounding <= LARGEST_ROUNDING:
        raise ValueError(f"its table would lose {rounding:.1e} to rounding in float32")
    if len(own.timesteps) >= SHORTEST_COMPARED:
        lost = _deviation(rows, recorded, stock(recorded, torch.float32)[0], np.float32)
        if not lost <= LARGEST_DIFFERENCE:
            raise ValueError(f"its own step loses {lost:.1e} to rounding in float32, which a table does not repeat")
    return replace(
        own, rows=rows, history=history, draws=tuple(recorded.draws), residual=residual, rounding=rounding, form=form, linear=True,
        noise_dtype=recorded.noise_dtype, looks_back=looks_back,
    )  # fmt: skip


def _known_reason(scheduler: Any, arguments: Mapping[str, Any]) -> str | None:
    config = getattr(scheduler, "config", {})
    reasons = {
        "its noise comes from a Brownian tree, not from the caller's generators": hasattr(scheduler, "noise_sampler"),
        "thresholding=True is not linear": config.get("thresholding"),
        "clip_sample=True is not linear": config.get("clip_sample"),
        "Runge-Kutta steps (skip_prk_steps=False) need five remembered tensors": config.get("skip_prk_steps") is False,
    }
    for name, value in arguments.items():
        number = isinstance(value, (int, float, str, bool, type(None)))
        reasons[f"step argument {name} is a {type(value).__name__}, not a number"] = not number
    return next((reason for reason, holds in reasons.items() if holds), None)


def _best_fold(recorded: Trace, rows: torch.Tensor) -> tuple[str, tuple[torch.Tensor, int, bool]]:
    """The first form that fits: the output itself, the scheduler's own conversion, whatever the coefficients say."""
    x0 = np.allclose(recorded.converted[:, 1] ** 2, rows[:-1, Row.W_X0].numpy(), rtol=1e-4)
    itself = np.tile([0.0, 1.0], (len(recorded.out), 1))
    for name, form in {"epsilon": itself, "x0" if x0 else "converted": recorded.converted}.items():
        with suppress(ValueError):
            return name, fold(recorded, form, rows)
    return "free", fold(recorded, free_form(recorded), rows)


def _rows_without_update(scheduler: Any, recorded: Trace, timesteps: torch.Tensor) -> torch.Tensor:
    rows = without_update(torch.zeros(len(timesteps) + 1, len(Row), dtype=torch.float64))
    rows[-1, Row.S] = 1.0
    body = rows[:-1]
    body[:, Row.ACTIVE] = 1.0
    body[:, Row.S] = torch.from_numpy(recorded.scale)
    body[:, Row.TIMESTEP] = timesteps.double()
    x, e, n = predictions(scheduler, recorded.sigma)
    body[:, [Row.W_EPSILON, Row.W_X0, Row.X, Row.E]] = torch.from_numpy(np.stack([n**2, e**2, x, e], axis=1))
    seen: set[float] = set()
    for k in np.flatnonzero(recorded.starts):
        body[k, Row.OBSERVE] = recorded.sigma[k] not in seen
        seen.add(recorded.sigma[k])
    return rows


def _deviation(rows: torch.Tensor, recorded: Trace, stock: np.ndarray, dtype: type[np.floating]) -> float:
    """Largest |x' - stock's x'| / max|x'| over rows, on the random columns, every row from the recorded x_k, in `dtype`."""
    x, e, z = (a.astype(dtype) for a in (recorded.probe_x, recorded.probe_e, recorded.probe_z))
    history = np.zeros((HISTORY, x.shape[1]), dtype)
    worst = 0.0
    for k, row in enumerate(rows[:-1].numpy()):
        c = row.astype(dtype)
        m = c[Row.P] * x[k] + c[Row.Q] * e[k]
        after = c[Row.A] * x[k] + c[Row.B] * m
        for slot in range(HISTORY):
            after = after + c[Row.H0 + slot] * history[slot]
        after = after + c[Row.N] * z[k]
        if row[Row.STORE] >= 0:
            history[int(row[Row.STORE])] = m
        worst = max(worst, float(np.abs(after - stock[k]).max() / np.abs(stock[k]).max()))
    return worst
