"""Factors that turn d = ||delta||^2 of the model's own output into epsilon space and x0 space (ALGORITHMS.md, section 3).

With x = alpha x0 + sigma n and s = sigma / alpha, the output difference delta means delta_x0 = Q delta, delta_n = Q delta / s:

    prediction   Q             W_EPSILON = (Q / s)^2     W_X0 = Q^2
    epsilon      -s            1                         s^2
    v            -sigma        alpha^2                   sigma^2        (alpha^2 = 1 / (1 + s^2), sigma^2 = s^2 / (1 + s^2))
    sample       1             1 / s^2                   1
    flow         -sigma        (1 - sigma)^2             sigma^2        (alpha = 1 - sigma)
    EDM          c_out         c_out^2 / sigma^2         c_out^2        (raw network output F, x0 = c_skip x + c_out F,
                                                                         c_out^2 = sigma^2 d^2 / (sigma^2 + d^2), d = sigma_data)
"""

from __future__ import annotations

from typing import Any

import numpy as np


def weights(scheduler: Any, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W_EPSILON, W_X0) per row; `levels` are sigmas, or timesteps for schedulers without sigmas.

    NaN where the space does not exist (x0 of an epsilon model at alpha = 0, an unknown scheduler): a NaN statistic decides nothing.
    """
    config = getattr(scheduler, "config", {})
    prediction = config.get("prediction_type", "epsilon")
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    flow_path = config.get("use_flow_sigmas") or any("FlowMatch" in name for name in names)
    with np.errstate(all="ignore"):
        if flow_path or prediction == "flow_prediction":
            alpha, sigma = 1.0 - levels, levels
            prediction = "flow_prediction" if any("FlowMatch" in name for name in names) else prediction
        elif hasattr(scheduler, "precondition_outputs"):
            data = config["sigma_data"] ** 2
            c_out = levels**2 * data / (levels**2 + data)
            return _finite(c_out / levels**2), _finite(c_out)
        else:
            alpha, sigma = _signal_and_noise(scheduler, levels)
            if hasattr(scheduler, "ets") and not hasattr(scheduler, "alphas_cumprod"):
                prediction = "v_prediction"  # IPNDM: noise = beta x + alpha e
        squared = (sigma / alpha) ** 2
        if prediction == "epsilon":
            return np.ones_like(squared), _finite(squared)
        if prediction == "v_prediction":
            total = alpha**2 + sigma**2
            return _finite(alpha**2 / total), _finite(sigma**2 / total)
        if prediction in ("sample", "original_sample"):
            return _finite(1.0 / squared), np.ones_like(squared)
        if prediction == "flow_prediction":
            return _finite(alpha**2), _finite(sigma**2)
    return np.full_like(levels, np.nan), np.full_like(levels, np.nan)


def _signal_and_noise(scheduler: Any, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) up to a common factor."""
    if getattr(scheduler, "sigmas", None) is not None:
        return np.ones_like(levels), levels
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


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)
