"""The plain loop of anchored guidance against its definition, and what the second model is made of."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from bench.testbed import harder, split
from bench.testbed.anchored_loop import Form, dot, factors, row

KINDS = ("epsilon", "v_prediction", "sample")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_factors_give_the_picture_back(family, kind):
    scheduler = family(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    scheduler.set_timesteps(7)
    x0, n = drawn(1, 4, 4, 4), drawn(1, 4, 4, 4, seed=1)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.add_noise(x0, n, t[None])
        if family is EulerDiscreteScheduler:  # its timesteps lie between those of alphas_cumprod
            alpha = (1 + scheduler.sigmas[k].double() ** 2) ** -0.5
        else:
            alpha = scheduler.alphas_cumprod.double()[int(t)].sqrt()
        output = {"epsilon": n, "sample": x0, "v_prediction": alpha * n - (1 - alpha**2).sqrt() * x0}[kind]
        to_x0, to_e = factors(scheduler, t)
        torch.testing.assert_close(to_x0 * x + to_e * output, x0, atol=2e-5, rtol=0)


def test_along_the_anchor_the_scale_is_the_bound_and_across_it_is_kept():
    """In x0: <guided - u0, a> = g_a p <a, a>, and what is orthogonal to a is g times that of c0 - u0."""
    form, g, to_x0, to_e = Form(reach=None), 5.0, 1.3, -0.8
    x, u, c = (drawn(3, 4, 4, 4, seed=k) for k in range(3))
    _, state, p = row(form, None, x, u, c, g, (to_x0, to_e))
    torch.testing.assert_close(p, torch.ones_like(p))
    x, u, c = (0.9 * one + 0.3 * drawn(3, 4, 4, 4, seed=k + 7) for k, one in enumerate((x, u, c)))
    e, state, p = row(form, state, x, u, c, g, (to_x0, to_e))
    assert (p > 0).all()
    u0, c0, e0 = (to_x0 * x + to_e * one for one in (u, c, e))
    a = state.m - u0
    bound = (1 - state.s) - 0.1 * g * state.s - state.rho
    torch.testing.assert_close(dot(e0 - u0, a), bound * p * dot(a, a))
    unit = a / dot(a, a).sqrt().reshape(-1, 1, 1, 1)

    def across(v):
        return v - dot(v, unit).reshape(-1, 1, 1, 1) * unit

    torch.testing.assert_close(across(e0 - u0), g * across(c0 - u0))


def test_what_guidance_adds_is_no_longer_than_the_reach():
    """Of two scales: at the small one nothing changes, at the large one the direction stays and the length is |m - mu| / s."""
    to_x0, to_e = 1.3, -0.8
    first = [drawn(3, 4, 4, 4, seed=k) for k in range(3)]
    _, state, _ = row(Form(), None, *first, 5.0, (to_x0, to_e))
    later = [0.9 * one + 0.3 * drawn(3, 4, 4, 4, seed=k + 7) for k, one in enumerate(first)]
    for g, bound in ((0.1, False), (50.0, True)):
        e, _, _ = row(Form(), state, *later, g, (to_x0, to_e))
        free, _, _ = row(Form(reach=None), state, *later, g, (to_x0, to_e))
        added, wanted = (to_e * (one - later[1]) for one in (e, free))
        if bound:
            length = (dot(state.m - state.mu, state.m - state.mu)).sqrt() / state.s
            wanted = wanted * (length / dot(wanted, wanted).sqrt()).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(added, wanted)


def test_a_sample_at_its_anchor_is_pushed_by_eta():
    form = Form()
    x, u, c = (drawn(2, 4, 4, 4, seed=k) for k in range(3))
    _, state, _ = row(form, None, x, u, c, 3.0, (1.0, -1.0))
    at_anchor = x - state.m  # x0 of this output is m
    for observation, rho in ((False, 0.0), (True, form.eta * (1 - form.allowed) * 50 / 25)):
        _, after, _ = row(form, state, x, at_anchor, c, 3.0, (1.0, -1.0), observation, 25)
        torch.testing.assert_close(after.rho, torch.full_like(after.rho, min(rho, form.most)))


def test_the_second_models_split_is_the_committed_one_and_shares_no_memorized_thing():
    committed, known = json.loads((harder.HERE / "prompts.json").read_text()), split.make()["memorized"]
    assert committed == harder.make()
    assert not {e["concept"] for rows in committed.values() for e in rows} & {e["concept"] for e in known}
