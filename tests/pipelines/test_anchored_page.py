"""The library's anchored images against a float64 loop that was written from docs/anchored.md alone.

Nothing of fastguard is in the loop: x0 comes from the scheduler's own noise levels and prediction type, the update is the scheduler's own step().
"""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch

import fastguard
from tests import pipelines

STEPS, SCALE = 20, 4.0
WEIGHTS = (0.45, 0.6, 0.8, 1.6)  # of the picture that each prompt has learned: anchors from faint to sharp
NEAR = 1e-4  # of a threshold: such an image may go either way
KINDS = ("epsilon", "v_prediction", "sample")
CASES = [(name, kind) for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep") for kind in KINDS]
CASES += [("HeunDiscrete", "epsilon"), ("HeunDiscrete", "v_prediction"), ("FlowMatchEuler", "flow")]


def signal_and_noise(scheduler, k, t):
    """(alpha, sigma) of x = alpha x0 + sigma n at row k, as `scheduler.step` gets x."""
    if "FlowMatch" in type(scheduler).__name__:
        return 1 - float(scheduler.sigmas[k]), float(scheduler.sigmas[k])
    if "Euler" in type(scheduler).__name__ or "Heun" in type(scheduler).__name__:
        return 1.0, float(scheduler.sigmas[k])
    kept = float(scheduler.alphas_cumprod[int(t)])
    return kept**0.5, (1 - kept) ** 0.5


def picture_factors(scheduler, k, t):
    """X and E of x0(e) = X x + E e."""
    alpha, sigma = signal_and_noise(scheduler, k, t)
    size = alpha**2 + sigma**2
    if "FlowMatch" in type(scheduler).__name__:  # e = n - x0, alpha = 1 - sigma
        return 1.0, -sigma
    return {
        "epsilon": (1 / alpha, -sigma / alpha),
        "v_prediction": (alpha / size, -sigma / size**0.5),  # e = (alpha n - sigma x0) / sqrt(alpha^2 + sigma^2)
        "sample": (0.0, 1.0),
    }[scheduler.config.prediction_type]


def toy(scheduler, y, t, weight):
    """A denoiser that draws to a picture, the harder the larger its prompt's weight [B]; output as the scheduler wants it. y: the model's input."""
    shape = (-1, 1, 1, 1)
    t, weight = torch.as_tensor(t).double().reshape(shape), weight.double().reshape(shape)
    generator = torch.Generator().manual_seed(11)
    learned, other = torch.randn(2, *y.shape[1:], dtype=torch.float64, generator=generator)
    part = t / 1000
    seen = torch.tanh(y.double())
    x0 = (0.9 - 0.2 * part) * (weight * learned + 0.3 * other) + 0.3 * seen
    if "FlowMatch" in type(scheduler).__name__:
        return ((y.double() - x0) / part).to(y.dtype)
    kept = scheduler.alphas_cumprod.double()[t.long()]
    noise = (y.double() - kept**0.5 * x0) / (1 - kept) ** 0.5
    outputs = {"epsilon": noise, "sample": x0, "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * x0}
    return outputs[scheduler.config.prediction_type].to(y.dtype)


def dot(a, b):
    return (a * b).flatten(1).sum(1).reshape(-1, 1, 1, 1)


def loop(scheduler, x, weights, g):
    """x: noise. docs/anchored.md, "The rule": (latents, shares [rows, B], whether an image came near a threshold [B], every rho, where it was shortened)."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    shares, rhos, shorter, near = [], [], [], torch.zeros(len(x), dtype=torch.bool)

    def clamp(value, top):
        nonlocal near
        near = near | ((value.abs() < NEAR) | ((value - top).abs() < NEAR)).flatten()
        return value.clamp(0, top)

    for k, t in enumerate(scheduler.timesteps):
        y = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        u, c = toy(scheduler, y, t, torch.zeros(len(x))), toy(scheduler, y, t, weights)
        X, E = picture_factors(scheduler, k, t)
        u0, c0 = X * x + E * u, X * x + E * c
        observed = getattr(scheduler, "state_in_first_order", True)  # Heun's mid-stages are no observations
        if k == 0:
            m, mu, rho = c0, u0, torch.zeros(len(x), 1, 1, 1, dtype=torch.float64)
            s = clamp((dot(m - mu, m - mu) / m[0].numel()).sqrt().sub(0.3).div(0.6 - 0.3), 1)
        elif observed:
            M, U = m - mu, u0 - mu
            v = 2 * dot(U, M) / (dot(U, U) + dot(M, M))
            rho = clamp(rho + 4 * (50 / STEPS) * (v - 0.2), 4)
        a = m - u0
        q = dot(c - u, a) / dot(a, a)
        p = E * q
        g_a = (1 - s) - 0.1 * max(g, 0) * s - rho
        near = near | ((p.abs() < NEAR) | ((g - g_a).abs() < NEAR)).flatten()
        added = g * (c - u) - torch.where(p > 0, (g - g_a).clamp(min=0) * q, 0.0) * a
        length = dot(m - mu, m - mu).sqrt() / s
        shortened = length / (E**2 * dot(added, added)).sqrt()
        shorter.append(shortened.flatten() < 1)
        e = u + shortened.clamp(max=1) * added
        shares.append(p.flatten())
        rhos.append(rho.flatten())
        x = scheduler.step(e, t, x).prev_sample
    return x, torch.stack(shares), near, torch.stack(rhos), torch.stack(shorter)


def pipeline(name, kind):
    """The library's side: a stock pipeline of diffusers whose denoiser is `toy`; a prompt's weight is its embedding."""
    if kind == "flow":
        pipe = pipelines.sd3()

        class Transformer(diffusers.SD3Transformer2DModel):
            def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True, **_):
                return (toy(pipe.scheduler, hidden_states, timestep, encoder_hidden_states.mean((1, 2))),)

        pipe.transformer.__class__ = Transformer
        pooled = {f"{which}pooled_prompt_embeds": torch.zeros(len(WEIGHTS), 64) for which in ("", "negative_")}
        return pipe, pooled, (16, 8, 8)
    more = {"clip_sample": False} if name == "DDIM" else {}
    made = getattr(diffusers, f"{name}Scheduler")(**pipelines.BETAS, prediction_type=kind, **more)
    pipe = pipelines.sd(scheduler=made)

    class UNet(diffusers.UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
            return (toy(pipe.scheduler, sample, timestep, encoder_hidden_states.mean((1, 2))),)

    pipe.unet.__class__ = UNet
    return pipe, {}, (4, 8, 8)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_shares_and_latents_are_those_of_the_page(name, kind):
    pipe, extra, shape = pipeline(name, kind)
    weights = torch.tensor(WEIGHTS)
    noise = torch.randn(len(weights), *shape, generator=torch.Generator().manual_seed(5))
    embeds = weights.reshape(-1, 1, 1).expand(-1, 4, 32)
    with fastguard.enable(pipe, "anchored", capture="off") as guard:
        found = pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=torch.zeros_like(embeds),
            latents=noise,
            height=shape[1] * 2,
            width=shape[2] * 2,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="latent",
            **extra,
        ).images
        shares = torch.tensor([one.share_curve for one in guard.report], dtype=torch.float64).T
    expected, wanted, near, rho, shorter = loop(pipe.scheduler, noise.double(), weights, SCALE)
    moves = ((rho > 0) & (rho < 4)).any() and shorter.any() and not shorter.all()
    assert near.sum() <= 1 and moves, "the case says nothing"
    clear = ~near
    size = expected[clear].abs().max().clamp(min=1)
    torch.testing.assert_close(found[clear].double() / size, expected[clear] / size, rtol=0, atol=1e-4)
    torch.testing.assert_close(shares[:, clear], wanted[:, clear], rtol=1e-4, atol=1e-4)
