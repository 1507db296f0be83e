"""Run a private copy of a diffusers scheduler on basis vectors and record what it does, row by row.

Every sample, model output and noise draw is one *lane*: a column that is 1 in its own tensor and 0 in all others. Row k is stepped
from a fresh lane x_k, not from the previous result, so the coefficients of x_{k+1} on x_j, e_j and z_j (j <= k) can be read off one
by one and nothing has to be fitted to nearly parallel trajectories. Some further columns carry random numbers through the real
trajectory; they show later whether the recorded coefficients tell the whole story (they do not if a step clamps).

Lanes are float64 and every scheduler scalar stays what stock computes (0-dim float32 times a float64 lane is float64), so the
coefficients hold stock's own rounding of log, exp and linalg.solve and no further one. A `TorchFunctionMode` keeps lanes from being
cast down and answers `torch.randn`; its stack is per thread, the global generator is never touched.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fastguard.schedules.scheduler_state import at_the_start, foreign, replaced_step

PROBES = 256  # random columns; with 64 the worst of a latent was missed by a factor of two


class Trace:
    """Lanes of K rows: columns [0, K) are x_j, [K, 2K) e_j, [2K, 3K) z_j; the probes are random columns. The rows are those from `begin` on,
    `arguments` go to step() besides."""

    def __init__(self, scheduler: Any, arguments: Mapping[str, Any], begin: int) -> None:
        self.scheduler, self.arguments, self.begin = scheduler, arguments, begin
        rows, first_scale = len(scheduler.timesteps[begin:]), float(getattr(scheduler, "init_noise_sigma", 1.0))
        rng = np.random.default_rng(0)
        self.out = np.zeros((rows, 3 * rows))  # coefficients of x_{k+1}
        self.converted = np.full((rows, 2), np.nan)  # (P, Q) of the output as the scheduler keeps it; NaN: it does not
        self.scale = np.ones(rows)  # factor of scale_model_input
        self.sigma = np.full(rows, np.nan)  # noise level: sigma, or the timestep without sigmas; NaN if unknown
        self.starts = np.ones(rows, dtype=bool)  # the evaluation begins a block (it is no mid-stage)
        self.draws = [0] * rows  # of noise, per row
        self.noise_dtype: torch.dtype | None = None  # of the draws; None: the model's
        # [K + 1, PROBES] the real trajectory of the random columns, of which the first row stays
        self.probe_x = rng.standard_normal((rows + 1, PROBES)) * first_scale
        self.probe_e, self.probe_z = rng.standard_normal((2, rows, PROBES))
        self.problem: str | None = None  # why the rows cannot be trusted


class Lanes(TorchFunctionMode):
    """Keeps lanes in float64 and answers torch.randn with the next noise lane."""

    def __init__(self, shape: torch.Size, noise: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.shape, self.noise = shape, noise
        self.dtype: torch.dtype | None = None  # of the draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and args and args[0] == self.shape:  # the form of diffusers' randn_tensor
            self.dtype = kwargs.get("dtype") or torch.get_default_dtype()
            return self.noise()
        if func in _OTHER_DRAWS:
            raise RuntimeError(f"it draws random numbers by {func.__name__}")
        result = func(*args, **kwargs)
        if func in _CASTS and args[0].shape == self.shape and args[0].dtype == torch.float64:
            return args[0]
        return result


_CASTS = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.half, torch.Tensor.type}
_OTHER_DRAWS = {
    *(torch.randn, torch.rand, torch.randn_like, torch.rand_like, torch.randint, torch.randperm),
    *(torch.normal, torch.bernoulli, torch.Tensor.normal_, torch.Tensor.uniform_),
}


def trace(scheduler: Any, arguments: Mapping[str, Any], begin: int) -> Trace:
    """Step a private copy through all rows from `begin` on. What the scheduler raises ends up in `problem`; with one only scale,
    sigma and starts are recorded.

    The step() of a foreign or replaced one is not called: whatever it does besides belongs to its owner.
    """
    result = Trace(at_the_start(scheduler), arguments, begin)
    private = at_the_start(result.scheduler)
    rows, lanes = result.out.shape
    shape = torch.Size((1, 1, 1, lanes + PROBES))
    result.problem = foreign(scheduler) or replaced_step(scheduler)
    row = 0

    def lane(column: int, probes: np.ndarray) -> torch.Tensor:
        tensor = torch.zeros(shape, dtype=torch.float64)
        tensor[..., column] = 1.0
        tensor[..., lanes:] = torch.from_numpy(probes)
        return tensor

    def noise() -> torch.Tensor:
        result.draws[row] += 1
        return lane(2 * rows + row, result.probe_z[row])

    mode = Lanes(shape, noise)
    for row, t in enumerate(private.timesteps[begin:]):
        x, e = lane(row, result.probe_x[row]), lane(rows + row, result.probe_e[row])
        index = after = None
        try:
            with mode:
                scaled = private.scale_model_input(x, t) if hasattr(private, "scale_model_input") else x
                if hasattr(private, "_init_step_index") and private.step_index is None:
                    private._init_step_index(t)
            result.scale[row] = float(scaled[..., row])
            if not torch.allclose(scaled, result.scale[row] * x, rtol=1e-12, atol=0.0):
                result.problem = result.problem or "scale_model_input is more than a factor"
            result.sigma[row], result.starts[row] = _sigma(private, t), _starts_block(private, row)
            index = getattr(private, "step_index", None)
            if result.problem is None:
                with mode:
                    after = private.step(e, t, x, **arguments, return_dict=False)[0].reshape(-1).numpy()
        except Exception as error:  # a foreign scheduler may raise anything
            result.problem = result.problem or f"step failed at row {row}: {type(error).__name__}: {error}"
        if after is None:  # go on for scale, sigma and starts alone
            _count_step(private, index)
            continue
        if not np.isfinite(after).all():
            result.problem = f"step is not finite at row {row}"
            continue
        result.out[row], result.probe_x[row + 1] = after[:lanes], after[lanes:]
        result.converted[row] = _kept_output(private, shape, row, rows)
    if (most := max(result.draws, default=0)) > 1:
        result.problem = result.problem or f"it draws noise {most} times in one row"
    if most and result.problem is None:
        with suppress(Exception):
            dtype = stock(result, torch.float16)[1]
            result.noise_dtype = None if dtype == torch.float16 else dtype
    return result


def stock(recorded: Trace, dtype: torch.dtype) -> tuple[np.ndarray, torch.dtype | None]:
    """x_{k+1} [K, PROBES] of the random columns as stock computes it in `dtype`, each row from the recorded x_k; the dtype of its draws."""
    shape = torch.Size((1, 1, 1, PROBES))

    def column(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(dtype).reshape(shape)

    result = np.empty_like(recorded.probe_e, dtype=np.float32)
    row = 0
    with Lanes(shape, lambda: column(recorded.probe_z[row])) as mode:
        private = at_the_start(recorded.scheduler)
        for row, t in enumerate(private.timesteps[recorded.begin :]):
            x = column(recorded.probe_x[row])
            if hasattr(private, "scale_model_input"):
                private.scale_model_input(x, t)
            after = private.step(column(recorded.probe_e[row]), t, x, **recorded.arguments, return_dict=False)[0]
            result[row] = after.reshape(-1).numpy()
    return result, mode.dtype


def _sigma(private: Any, t: torch.Tensor) -> float:
    """Noise level of the row about to run: sigma where the scheduler has sigmas, else its timestep."""
    index = getattr(private, "step_index", None)
    if index is not None and getattr(private, "sigmas", None) is not None:
        if hasattr(private, "sigmas_interpol") and not private.state_in_first_order:
            # KDPM2's mid-stage; the ancestral one's lies a row before.
            return float(private.sigmas_interpol[index - hasattr(private, "sigmas_down")])
        return float(private.sigmas[index])
    return float(t)


def _starts_block(private: Any, row: int) -> bool:
    """False where the row about to run is a mid-stage of Heun, KDPM2, single-step DPM or PNDM's Runge-Kutta steps."""
    if hasattr(private, "order_list"):
        # The n-th evaluation of a block has order n, after a late start at most that of the rows run.
        return min(private.order_list[private.step_index], row + 1) == 1
    runge_kutta = getattr(private, "prk_timesteps", None)
    if runge_kutta is not None and private.counter < len(runge_kutta):
        return private.counter % 4 == 0
    return bool(getattr(private, "state_in_first_order", True))


def _count_step(private: Any, index: int | None) -> None:
    """Move the scheduler's counters past a row whose step() is not run."""
    if index is not None:
        private._step_index = index + 1
    if hasattr(private, "counter"):
        private.counter += 1
    if hasattr(private, "state_in_first_order"):  # Heun reads it from dt, KDPM2 from sample
        private.dt = private.sample = 0.0 if private.state_in_first_order else None


def _kept_output(private: Any, shape: torch.Size, row: int, rows: int) -> tuple[float, float]:
    """(P, Q) of the converted output m = P x + Q e that the scheduler keeps for later rows; NaN if it keeps none.

    Lists hold outputs (model_outputs, ets, derivatives), newest last. A tensor by itself may also be the sample: it has no e.
    """
    values = list(vars(private).values())
    listed = [value[-1] for value in values if isinstance(value, list) and value]
    for kept, is_output in [(v, True) for v in listed] + [(v, False) for v in values]:
        if not isinstance(kept, torch.Tensor) or kept.shape != shape:
            continue
        lanes = kept.reshape(-1)[: 3 * rows].numpy()
        p, q = float(lanes[row]), float(lanes[rows + row])
        if np.count_nonzero(lanes) == (p != 0.0) + (q != 0.0) and (is_output or q != 0.0):
            return p, q
    return np.nan, np.nan
