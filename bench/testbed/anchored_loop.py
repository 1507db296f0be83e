"""Anchored guidance in plain torch: the rule of docs/anchored.md once more, row by row, beside the library's fused op.

It reads no table of the library: X and E, which give x0(e) = X x + E e, come from the scheduler's own noise levels here, so that the two can be
compared. Forms that were tried and left differ in the fields of `Form`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OBSERVATIONS = 50  # that eta is stated for


@dataclass(frozen=True)
class Form:
    """The numbers of the rule; those that ship are the defaults.

    faint, sharp: RMS(m - mu) at which the strength s is 0 and 1 (both 0: s = 1 always)
    bound: guidance along the anchor at s = 0; None: all of it;  push: of g that is added against the anchor at s = 1
    eta, allowed, least, most: rho grows by eta (drift - allowed), between least and most
    reach: what guidance adds to x0 is at most reach |m - mu| / s long; None: of any length
    drift: "likeness" 2 <U, M> / (<U, U> + <M, M>), or "advance" <U, M> / <M, M>
    refreshes, weight, alike: over so many observations m moves by weight * s to x0(c), where cos(x0(c), m) > alike. Left.
    """

    faint: float = 0.3
    sharp: float = 0.6
    bound: float | None = 1.0
    push: float = 0.1
    eta: float = 4.0
    allowed: float = 0.2
    least: float = 0.0
    most: float = 4.0
    reach: float | None = 1.0
    drift: str = "likeness"
    refreshes: int = 0
    weight: float = 0.0
    alike: float = -1.0


@dataclass(frozen=True)
class State:
    """What an image carries from row to row: m, mu [B, C, *S]; s, rho, count of observations after the first [B]."""

    m: Tensor
    mu: Tensor
    s: Tensor
    rho: Tensor
    count: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each image, [B]."""
    return (a * b).flatten(1).sum(1)


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def start(form: Form, u0: Tensor, c0: Tensor) -> State:
    """The state that the first row writes."""
    sigma = (c0 - u0).square().flatten(1).mean(1).sqrt()
    span = form.sharp - form.faint
    s = ((sigma - form.faint) / span).clamp(0, 1) if span else torch.ones_like(sigma)
    return State(c0, u0, s, torch.full_like(s, form.least), torch.zeros_like(s))


def observe(form: Form, state: State, u0: Tensor, c0: Tensor, observations: int) -> State:
    """The state after a later observation: drift, rho, and for some forms m."""
    m, gone = state.m - state.mu, u0 - state.mu
    to = dot(gone, m)
    mm = dot(m, m)
    drift = over(2 * to, dot(gone, gone) + mm) if form.drift == "likeness" else over(to, mm)
    rho = state.rho + form.eta * OBSERVATIONS / observations * (drift - form.allowed)
    near = torch.cosine_similarity(state.m.flatten(1), c0.flatten(1)) > form.alike
    w = torch.where((state.count < form.refreshes) & near, form.weight * state.s, torch.zeros_like(state.s))
    m = state.m + each(w, u0) * (c0 - state.m)
    return State(m, state.mu, state.s, rho.clamp(form.least, form.most), state.count + 1)


def guided(form: Form, state: State, u: Tensor, c: Tensor, u0: Tensor, g: float, to_e: float) -> tuple[Tensor, Tensor]:
    """(e [B, C, *S], share p [B] of delta that leads to m)."""
    a, delta = state.m - u0, c - u
    q = over(dot(delta, a), dot(a, a))
    along = (1 - state.s) * (g if form.bound is None else form.bound) - form.push * max(g, 0.0) * state.s - state.rho
    taken = torch.where(to_e * q > 0, (g - along).clamp(min=0) * q, torch.zeros_like(q))
    added = g * delta - each(taken, u) * a
    if form.reach is not None:
        anchor = dot(state.m - state.mu, state.m - state.mu).sqrt()
        size = state.s * abs(to_e) * dot(added, added).sqrt()
        added = added * each((form.reach * anchor / size).clamp(max=1), u)
    return u + added, to_e * q


def each(values: Tensor, like: Tensor) -> Tensor:
    """One value an image, shaped to multiply `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def row(
    form: Form,
    state: State | None,
    x: Tensor,
    u: Tensor,
    c: Tensor,
    g: float,
    factors: tuple[float, float],
    observation: bool = True,
    observations: int = OBSERVATIONS,
) -> tuple[Tensor, State, Tensor]:
    """One row: (guided output e, state after it, share p [B]). state: None at the first row; factors: X, E of the row."""
    to_x0, to_e = factors
    u0, c0 = to_x0 * x + to_e * u, to_x0 * x + to_e * c
    if state is None:
        state = start(form, u0, c0)
    elif observation:
        state = observe(form, state, u0, c0, observations)
    e, p = guided(form, state, u, c, u0, g, to_e)
    return e, state, p


def factors(scheduler: Any, t: Tensor) -> tuple[float, float]:
    """X and E at timestep t, with x as scheduler.step gets it, from the noise level alone.

    Variance-preserving latents: x = alpha x0 + sigma n. diffusers' Euler and Heun: x = x0 + sigma n, scaled by 1 / sqrt(1 + sigma^2) for the model.
    """
    kind = scheduler.config.prediction_type
    if type(scheduler).__name__.startswith(("Euler", "Heun", "LMS")):
        sigma = float(scheduler.sigmas[int((scheduler.timesteps == t).nonzero()[0, 0])])
        alpha, scale = 1.0, (1 + sigma**2) ** 0.5
    else:
        alpha = float(scheduler.alphas_cumprod.double()[int(t)]) ** 0.5
        sigma, scale = (1 - alpha**2) ** 0.5, 1.0
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha
    if kind == "v_prediction":
        return alpha / scale**2, -sigma / scale
    if kind == "sample":
        return 0.0, 1.0
    raise ValueError(f"prediction_type={kind!r}: must be 'epsilon', 'v_prediction' or 'sample'")


@torch.inference_mode()
def sample(
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    scheduler: Any,
    noise: Tensor,
    steps: int,
    g: float,
    form: Form | None,
) -> tuple[Tensor, list[Tensor]]:
    """Latents after `steps` of one-evaluation steps, and the share of every row; form None: plain guidance.

    denoise(model input, t) gives (u, c); noise: of unit variance. The scheduler evaluates every noise level once, so every row is an observation.
    """
    scheduler.set_timesteps(steps)
    x, state, shares = noise * float(scheduler.init_noise_sigma), None, []
    for t in scheduler.timesteps:
        u, c = denoise(scheduler.scale_model_input(x, t), t)
        if form is None:
            e = u + g * (c - u)
        else:
            e, state, p = row(form, state, x, u, c, g, factors(scheduler, t), observations=steps)
            shares.append(p)
        x = scheduler.step(e, t, x).prev_sample
    return x, shares
