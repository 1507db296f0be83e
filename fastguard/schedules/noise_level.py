"""What the model's output means at a row: the x0-prediction made of it, and the factors of d in epsilon and x0 space.

A row's latents are x = a x0 + b n, with (a, b) as the scheduler adds noise: a sigma schedule's latents may keep their variance (DPM-Solver++,
UniPC, DEIS: a = 1 / sqrt(1 + sigma^2)) or not (Euler, Heun: a = 1). With e the model's exact output there, and delta a difference of two outputs,

    x0(e) = X x + E e,    delta_x0 = E delta,    delta_n = N delta,    W_X0 = E^2,    W_EPSILON = N^2

    prediction   X              E               N
    epsilon      1 / a          -b / a          1
    v            a / (a^2+b^2)  -b / r          a / r               r = sqrt(a^2 + b^2); v = (a n - b x0) / r
    sample       0              1               -a / b
    flow         1              -b              1 - b               v = n - x0, a = 1 - b
    EDM          c_skip         c_out           -c_out / sigma      as its precondition_outputs says

NaN where it is unknown or infinite (epsilon at a = 0, a scheduler that is not diffusers' own): a NaN statistic decides nothing, and an
anchored policy is refused.
"""

from typing import Any

import numpy as np
import torch

from fastguard.schedules.scheduler_state import at_the_start, foreign

LARGEST_DEVIATION = 1e-5  # of (a, b) from what add_noise does, which computes in float32


def predictions(scheduler: Any, levels: np.ndarray) -> list[np.ndarray]:
    """X, E and N of every row. `levels`: sigmas, or timesteps for schedulers without sigmas, one per row."""
    a, b = signal_and_noise(scheduler, levels)
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "epsilon")
    if "FlowMatch" in _lineage(scheduler):
        kind = "flow_prediction"
    elif hasattr(scheduler, "ets") and not hasattr(scheduler, "alphas_cumprod"):
        kind = "v_prediction"  # IPNDM: noise = b x + a e
    one, zero, r = np.ones_like(a), np.zeros_like(a), np.hypot(a, b)
    with np.errstate(all="ignore"):
        known = {
            "epsilon": (1.0 / a, -b / a, one),
            "v_prediction": (a / r**2, -b / r, a / r),
            **dict.fromkeys(("sample", "original_sample"), (zero, one, -a / b)),
            "flow_prediction": (one, -b, 1.0 - b),
        }
        found = known.get(kind, (one * np.nan,) * 3)
        if hasattr(scheduler, "precondition_outputs"):
            ones, zeros, sigma = map(torch.from_numpy, (one, zero, levels))
            x, e = (scheduler.precondition_outputs(*pair, sigma).numpy() for pair in ((ones, zeros), (zeros, ones)))
            found = (x, e, -e / levels)
    return [np.where(np.isfinite(values), values, np.nan) for values in found]


def signal_and_noise(scheduler: Any, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of every row."""
    if getattr(scheduler, "sigmas", None) is not None:
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            a, b = (torch.as_tensor(part) for part in scheduler._sigma_to_alpha_sigma_t(torch.from_numpy(levels)))
            return a.double().expand(len(levels)).numpy(), b.double().expand(len(levels)).numpy()
        flow = "FlowMatch" in _lineage(scheduler) or getattr(scheduler, "config", {}).get("use_flow_sigmas")
        return 1.0 - levels if flow else np.ones_like(levels), levels
    if hasattr(scheduler, "alphas_cumprod"):
        table = scheduler.alphas_cumprod.double().cpu().numpy()
        kept = table[np.clip(levels, 0, len(table) - 1).astype(int)]
        return np.sqrt(kept), np.sqrt(1.0 - kept)
    if hasattr(scheduler, "ets"):  # IPNDM: one alpha and beta per entry of `timesteps`
        known = scheduler.timesteps.double().cpu().numpy()
        rows = np.abs(known[None, :] - levels[:, None]).argmin(axis=1)
        alphas, betas = (getattr(scheduler, name).double().cpu().numpy()[rows] for name in ("alphas", "betas"))
        return alphas, betas
    return np.full_like(levels, np.nan), np.full_like(levels, np.nan)


def unknown(scheduler: Any, timesteps: torch.Tensor, levels: np.ndarray, starts: np.ndarray) -> str | None:
    """Why X and E must not be used: the scheduler is foreign, or adds noise otherwise than (a, b) say. None if they may.

    Mid-stages are left out: add_noise knows of none.
    """
    if reason := foreign(scheduler):
        return reason
    if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        return None
    own = np.stack(signal_and_noise(scheduler, levels), axis=1)
    try:
        mixed = _mixed(at_the_start(scheduler), timesteps)
    except NotImplementedError:  # IPNDM
        return None
    except Exception as error:
        return f"add_noise failed: {error}"
    worst = (np.abs(own - mixed) / np.maximum(1.0, np.abs(own)))[starts].max(initial=0.0)
    return None if worst <= LARGEST_DEVIATION else f"{type(scheduler).__name__}.add_noise differs by {worst:.1e}"


def _mixed(fresh: Any, timesteps: torch.Tensor) -> np.ndarray:
    """(a, b) of every row [K, 2], as the scheduler adds noise itself: to signal alone, to noise alone."""
    fresh._begin_index = None  # else add_noise takes every timestep for the first one
    x, z = (column.expand(len(timesteps), 2) for column in torch.eye(2))
    if hasattr(fresh, "add_noise"):
        return fresh.add_noise(x, z, timesteps).double().numpy()
    rows = []
    for k, t in enumerate(timesteps):
        fresh._step_index = None  # scale_noise moves on through the schedule
        rows.append(fresh.scale_noise(x[k], t[None], z[k]).double().numpy())
    return np.stack(rows)


def _lineage(scheduler: Any) -> str:
    return " ".join(kind.__name__ for kind in type(scheduler).__mro__)
