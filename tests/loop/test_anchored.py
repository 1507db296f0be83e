"""Anchored guidance through whole generations: rows that are no observations, other images beside, what is not finite, what is refused."""

from __future__ import annotations

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch

from fastguard.kernels.layout import Anchor, Row, Rule, State
from fastguard.loop.loop import Loop
from fastguard.loop.report import Report
from fastguard.policies.plan import lower
from fastguard.policies.presets import policy
from fastguard.schedules.compiler import compile_schedule
from tests import tables
from tests.pipelines import BETAS

SHAPE = (4, 6, 5)
ELEMENTS = math.prod(SHAPE)
SCALE = 5.0
STEPS = 12


def scheduler(name, kind):
    extra = {"clip_sample": False} if name == "DDIM" else {}
    made = getattr(diffusers, name + "Scheduler")(**BETAS, prediction_type=kind, **extra)
    made.set_timesteps(STEPS)
    return made


class Denoiser:
    """Two branches that pull to two pictures: one sharp, one faint, harder the less noise there is."""

    def __init__(self, made, kind, sharpness=1.5):
        generator = torch.Generator().manual_seed(3)
        self.made, self.kind = made, kind
        self.pictures = torch.randn(2, *SHAPE, dtype=torch.float64, generator=generator) * torch.tensor(
            [0.3, sharpness]
        ).view(2, 1, 1, 1)
        self.rows = compile_schedule(made).rows

    def __call__(self, k, x):
        """u and c [B, *SHAPE]: outputs whose x0 is between the picture and a function of x."""
        X, E = (float(self.rows[k, column]) for column in (15, 16))
        pull = 0.3 + 0.6 * k / STEPS
        seen = torch.tanh(0.3 * x / (1 + X if X < 2 else X))
        outputs = []
        for picture in self.pictures:
            x0 = pull * picture + (1 - pull) * seen
            outputs.append((x0 - X * x) / E)
        return outputs


def reference(made, kind, denoise, x, scale, constants):
    """The formula, one sample, float64, the scheduler's own step() on the guided output. Returns latents and shares."""
    faint, sharp, back, eta, drift, most = constants
    rows = denoise.rows
    observations = int(rows[:-1, 10].sum())
    m = mu = s = None
    rho, shares = 0.0, []
    for k, t in enumerate(made.timesteps):
        u, c = (part[0] for part in denoise(k, x[None]))
        X, E = (float(rows[k, column]) for column in (15, 16))
        u0, c0 = X * x + E * u, X * x + E * c
        if k == 0:
            m, mu = c0, u0
            s = min(max((float((m - mu).square().mean().sqrt()) - faint) / (sharp - faint), 0), 1)
        elif rows[k, 10]:
            U, M = u0 - mu, m - mu
            v = 2 * float((U * M).sum()) / float(U.square().sum() + M.square().sum())
            rho = min(max(rho + eta * 50 / observations * (v - drift), 0), most)
        a, d0 = m - u0, c0 - u0
        p = float((d0 * a).sum() / a.square().sum())
        g_a = (1 - s) - back * max(scale, 0) * s - rho
        f0 = max(scale - g_a, 0) * p if p > 0 else 0.0
        added = scale * d0 - f0 * a
        reach = float((m - mu).norm()) / s if s > 0 else math.inf
        e = (u0 + min(1.0, reach / float(added.norm())) * added - X * x) / E
        if hasattr(made, "scale_model_input"):
            made.scale_model_input(x, t)
        x = made.step(e, t, x).prev_sample
        shares.append(p)
    return x, shares


def run(made, policies, denoise, x, backend=None):
    schedule = compile_schedule(made)
    plan = lower(policies, schedule, SCALE, ELEMENTS)
    loop = Loop(schedule, plan, x.float())
    for k in range(len(schedule.timesteps)):
        u, c = denoise(k, loop.x.double())
        loop.advance(u.float(), c.float())
    return loop, Report(loop, plan, path="test", rows_run=0)


def test_unguarded_samples_keep_their_bits_beside_anchored_ones():
    made = scheduler("DDIM", "epsilon")
    denoise = Denoiser(made, "epsilon")
    x = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain, _ = run(made, [policy("cfg")] * 4, denoise, x)
    policies = [policy("cfg"), policy("anchored"), policy("anchored", gate=1e6), policy("anchored", gate=1e-6)]
    mixed, report = run(made, policies, denoise, x)
    assert torch.equal(mixed.x[[0, 2]], plain.x[[0, 2]])
    assert not torch.isclose(mixed.x[[1, 3]], plain.x[[1, 3]], atol=1e-2).flatten(1).all(1).any()
    alone, _ = run(made, [policies[1]], denoise, x[1:2])
    assert torch.equal(alone.x[0], mixed.x[1])
    assert [image.share_curve[-1] is None for image in report] == [True, False, True, False]
    assert [image.transition_text() for image in report] == ["plain guidance", "anchored", "plain guidance", "anchored"]
    assert all(image.transition_step is None for image in report)


def test_a_guarded_image_leaves_the_picture_and_a_plain_one_does_not():
    made = scheduler("DDIM", "epsilon")
    denoise = Denoiser(made, "epsilon")
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    loop, _ = run(made, [policy("cfg"), policy("anchored")], denoise, x)
    cosines = torch.nn.functional.cosine_similarity(loop.x.flatten(1), denoise.pictures[1].float().flatten()[None])
    assert cosines[0] > 0.95 and cosines[1] < 0.7


def test_rho_moves_at_observations_only():
    """Heun evaluates each noise level twice."""
    made = scheduler("HeunDiscrete", "epsilon")
    denoise = Denoiser(made, "epsilon")
    x = torch.randn(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * made.init_noise_sigma
    schedule = compile_schedule(made)
    plan = lower([policy("anchored")], schedule, SCALE, ELEMENTS)
    plan.rules[0, Rule.DRIFT] = -1.0  # so that it moves at all
    loop = Loop(schedule, plan, x.float())
    before = 0.0
    for k in range(len(schedule.timesteps)):
        u, c = denoise(k, loop.x.double())
        loop.advance(u.float(), c.float())
        rho = float(loop.state[0, State.PUSH])
        assert schedule.rows[k, 10] or rho == before
        before = rho
    assert before > 0


@pytest.mark.parametrize("fault", [None, "rho moves at every row", "m is written anew where nothing is observed"])
def test_planted_rows_that_are_no_observation_are_found(fault):
    """Against the formula, with a drift allowance at which rho moves."""
    from fastguard.policies import plan as numbers

    made = scheduler("HeunDiscrete", "epsilon")
    denoise = Denoiser(made, "epsilon")
    x = torch.randn(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * made.init_noise_sigma
    constants = (numbers.FAINT, numbers.SHARP, numbers.BACK, numbers.ETA, -1.0, numbers.MOST)
    _, want = reference(scheduler("HeunDiscrete", "epsilon"), "epsilon", denoise, x[0], SCALE, constants)
    schedule = compile_schedule(made)
    plan = lower([policy("anchored")], schedule, SCALE, ELEMENTS)
    plan.rules[0, Rule.DRIFT] = -1.0
    observed = schedule.rows[:, Row.OBSERVE]
    if fault == "rho moves at every row":
        rows = schedule.rows.clone()
        rows[:-1, Row.OBSERVE] = 1.0
        schedule = dataclasses.replace(schedule, rows=rows)
    loop = Loop(schedule, plan, x.float())
    for k in range(len(schedule.timesteps)):
        if fault is not None and fault.startswith("m") and not observed[k]:
            loop.state[0, State.ANCHOR] = Anchor.UNWRITTEN
        u, c = denoise(k, loop.x.double())
        loop.advance(u.float(), c.float())
    off = np.abs(loop.shares[: len(want), 0].numpy() - want).max()
    assert off < 1e-4 if fault is None else off > 1e-2


@pytest.mark.parametrize("where", ["u", "c", "x"])
def test_what_is_not_finite_ends_guidance_of_a_caught_image_and_is_told(where):
    made = scheduler("DDIM", "epsilon")
    denoise = Denoiser(made, "epsilon")
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    schedule = compile_schedule(made)
    plan = lower([policy("anchored"), policy("cfg")], schedule, SCALE, ELEMENTS)
    loop = Loop(schedule, plan, x.float())
    for k in range(3):
        u, c = (part.float() for part in denoise(k, loop.x.double()))
        if k == 1:
            {"u": u, "c": c, "x": loop.x}[where][:, 0, 0, 0] = float("inf")
        if k == 2:
            u, c = torch.zeros_like(u), torch.ones_like(c)
            loop.x.fill_(1.0)
        loop.advance(u, c)
    row = schedule.rows[2]
    expected = row[2] + row[3] * row[0]  # g = 0: x' = A x + B P x, with e = u = 0
    torch.testing.assert_close(loop.x[0], torch.full_like(loop.x[0], float(expected)))
    assert not torch.allclose(loop.x[1], loop.x[0])
    report = Report(loop, plan, path="test", rows_run=6)
    assert report[0].non_finite == 1 and report[0].share_curve[1] is None


def test_where_x0_is_unknown_it_is_refused_by_name():
    with pytest.raises(ValueError, match=r"policy 'anchored' is anchored, .*no x0 follows .*alpha is 0"):
        made = diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        made.set_timesteps(STEPS)
        lower([policy("anchored")], compile_schedule(made), SCALE, ELEMENTS)

    class Foreign(diffusers.DDIMScheduler):
        pass

    made = Foreign(clip_sample=False)
    made.set_timesteps(STEPS)
    with pytest.raises(ValueError, match="Foreign is not diffusers' own"):
        lower([policy("anchored")], compile_schedule(made), SCALE, ELEMENTS)


def test_policy():
    p = policy("anchored", gate=0.1)
    assert p.guarded and policy("cfg").guarded is False
    assert policy("anchored").ungated_warning() and p.ungated_warning() is None
    plan = lower(
        [p, policy("stp", anchored=True), policy("cfg")], tables.schedule([900.0, 600.0, 300.0]), SCALE, ELEMENTS
    )
    assert plan.branches == ("both",) * 3 and plan.anchored
    assert not lower([policy("stp")], tables.schedule([900.0, 600.0]), SCALE, ELEMENTS).anchored
    with pytest.raises(ValueError, match="anchored='yes'"):
        policy("anchored", anchored="yes")
    with pytest.raises(ValueError, match="has no effect"):
        policy("cfg", gate=0.1)
    with pytest.raises(ValueError, match="monitor=True has no effect here: it needs anchored=False"):
        policy("anchored", monitor=True)
