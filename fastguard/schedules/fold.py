"""Fold traced lanes into x' = A x + B m + sum_j H_j history[j] + N z with one tensor m = P x + Q e per remembered row.

Row k of the trace is a vector over lanes x_j, e_j, z_j (j <= k). Split what it takes from each older row j into the part along
m_j = (P_j, Q_j) and the part across it. If nothing is left across, the row is folded. If something is, the scheduler went back to an
older sample (Heun's and KDPM2's second stage, PNDM's second row, single-step DPM, the correctors of UniPC and SA-Solver); x_k is
made of that sample too, so row k equals row k + c (x_k - row_{k-1}) for every c, and one c removes all of it or the form does not fit.
"""

import numpy as np
import torch

from fastguard.kernels.layout import HISTORY, Row
from fastguard.schedules.trace import Trace

EXACT = 1e-10  # coefficients below this part of the row's largest are rounding (float64 leaves 1e-16 to 1e-13)


def fold(trace: Trace, form: np.ndarray, rows: torch.Tensor) -> tuple[torch.Tensor, int, bool]:
    """Fold with m_j = form[j] = (P, Q): `rows` with the update, history slots in use, whether some row holds only if each x_k is what
    row k - 1 gave. ValueError if it does not fit or needs too many slots."""
    unfit = ValueError("not linear, or a row looks back at more than one tensor per earlier row")
    count = len(form)
    if not np.isfinite(form).all():
        raise unfit
    # m's scale is free: with 1 on the larger side m has one rounded product less. It shows where a row extrapolates from m
    # (DPM-Solver++ 3M to sigma_min, 20 steps, differs from stock by 1.7e-6 instead of 2.0e-6).
    form = form / np.abs(form).max(axis=1, keepdims=True)
    lags, back = np.zeros((count, count)), np.zeros(count)
    for k in range(count):
        scale = np.abs(trace.out[k]).max()
        along, across = _split(trace.out[k], form, k)
        if np.abs(across).max(initial=0.0) > EXACT * scale:
            previous_along, previous_across = _split(trace.out[k - 1], form, k)
            norm = previous_across @ previous_across
            back[k] = across @ previous_across / norm if norm > 0.0 else 0.0
            if np.abs(across - back[k] * previous_across).max() > EXACT * scale:
                raise unfit
            along = along - back[k] * previous_along
        lags[k, :k] = np.where(np.abs(along) > EXACT * scale, along, 0.0)
    weights, store, history = _assign_slots(lags)

    index = np.arange(count)
    on_x, on_e, n = (trace.out[index, block * count + index] for block in range(3))
    on_x = on_x + back
    # A row that nobody looks back at needs no conversion: one rounding less.
    p, q = np.where(store[:, None] < 0, (0.0, 1.0), form).T
    if ((q == 0.0) & (on_e != 0.0)).any():
        raise unfit
    if history > HISTORY:
        raise ValueError(f"it needs {history} remembered tensors, {HISTORY} are supported")
    b = np.divide(on_e, q, out=np.zeros(count), where=q != 0.0)
    a = on_x - b * p
    a[np.abs(a) < 1e-15 * np.abs(on_x)] = 0.0
    rows = rows.clone()
    body = rows[:-1].numpy()  # the same memory
    body[:, [Row.P, Row.Q, Row.A, Row.B, Row.N, Row.STORE]] = np.stack([p, q, a, b, n, store], axis=1)
    body[:, Row.H0 : Row.H0 + history] = weights[:, :history]
    return rows, history, bool(back.any())


def free_form(trace: Trace) -> np.ndarray:
    """(P, Q) of each row read from the first later row that looks back at it; (0, 1) where none does."""
    rows = len(trace.out)
    form = np.tile([0.0, 1.0], (rows, 1))
    for j in range(rows):
        pairs = trace.out[j + 1 :, [j, rows + j]]
        size = np.abs(pairs).max(axis=1, initial=0.0)
        used = np.flatnonzero(size > EXACT * np.abs(trace.out[j + 1 :]).max(axis=1, initial=0.0))
        if len(used):
            form[j] = pairs[used[0]] / size[used[0]]
    return form


def _split(row: np.ndarray, form: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(weights of m_j, everything else) that a row takes from the rows j < k."""
    rows = len(form)
    x, e, z = (row[block * rows : block * rows + k] for block in range(3))
    p, q = form[:k, 0], form[:k, 1]
    size = np.hypot(p, q)
    return (x * p + e * q) / size**2, np.concatenate([(e * p - x * q) / size, z])


def _assign_slots(lags: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(weight of each slot in each row; slot a row is stored in or -1; slots in use): m_j is kept from row j to the last row that reads it,
    always in the lowest free slot (a row reads before it stores)."""
    last = [max(np.flatnonzero(column), default=-1) for column in lags.T]
    live: dict[int, int] = {}
    weights, store = np.zeros_like(lags), np.full(len(lags), -1)
    for k, lag in enumerate(lags):
        weights[k, list(live.values())] = lag[list(live)]
        live = {j: slot for j, slot in live.items() if last[j] > k}
        if last[k] > k:
            live[k] = store[k] = min(set(range(len(live) + 1)) - set(live.values()))
    return weights, store, int(store.max(initial=-1)) + 1
