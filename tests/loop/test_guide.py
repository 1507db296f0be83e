"""`Guide` against a plain float64 loop that is written here from the published rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from fastguard.kernels.layout import Row
from fastguard.loop.guide import Guide
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from fastguard.schedules.compiler import compile_schedule
from fastguard.schedules.schedule import Schedule

SHAPE = (4, 8, 8)
STEPS = 12
SCALE = 5.0
DTYPES = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}  # relative to the largest value: rounding of e


def schedule_of(kind: Any = DDIMScheduler, steps: int = STEPS) -> Schedule:
    scheduler = kind()
    scheduler.set_timesteps(steps)
    return compile_schedule(scheduler)


def outputs(norms: list[float], dtype: torch.dtype, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(u, c) of one image per row with RMS(c - u) = norms[k]."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for norm in norms:
        u, delta = torch.randn(2, *SHAPE, generator=generator)
        rows.append((u.to(dtype), (u + norm * delta / delta.square().mean().sqrt()).to(dtype)))
    return rows


def plain(p: Policy, rows: list[tuple], s: Schedule, scales: list[float]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """One image, row by row, in float64."""
    state = "plain" if p.transition is None else "before" if p.gate is None else "undecided"
    seen: list[float] = []
    guided, curve, transition, caught = [], [], None, None
    for k, (u, c) in enumerate(rows):
        u, c = u.double(), c.double()
        d = float((c - u).square().sum())
        curve.append(d)
        t, levels = float(s.timesteps[k]), [float(v) for v in s.timesteps[:k]]
        if t not in levels:  # DDIM, Euler and Heun below: a noise level is seen first by its first row
            seen.append(d)
            if state == "undecided":
                if math.sqrt(d / u.numel()) >= p.gate:
                    state, caught = "before", k
                elif len(seen) == p.gate_steps:
                    state = "plain"
            limit = p.t_star if p.transition == "static" else p.deadline
            dip = len(seen) > 2 and seen[-3] > seen[-2] < seen[-1] and p.transition == "dynamic"
            if state == "before" and (dip or (limit is not None and t <= limit)):
                state, transition = "after", k
        after = scales[k] if p.guidance_scale is None else p.guidance_scale
        before = {"zero": 0.0, "conditional": 1.0, "opposite": -after}.get(p.before, p.before)
        guided.append(u + (before if state == "before" else after) * (c - u))
    return guided, {"curve": curve, "transition": transition, "caught": caught}


DIP = [9.0, 7.0, 5.0, 3.0, 2.0, 4.0, 5.0, 6.0, 5.0, 4.0, 3.0, 2.0]
FALLING = [float(12 - k) for k in range(STEPS)]
CASES = {
    "cfg": (policy("cfg"), DIP),
    "zero": (policy("stp"), DIP),
    "opposite": (policy("stp", before="opposite"), DIP),
    "number": (policy("og+stp", before=-1.5), DIP),
    "conditional": (policy("released-dtp"), DIP),
    "dynamic": (policy("paper-og+dtp"), DIP),
    "deadline": (policy("dtp"), FALLING),
    "never": (policy("paper-dtp"), FALLING),
    "caught": (policy("dtp", gate=8.0), DIP),
    "caught late": (policy("dtp", gate=12.5, gate_steps=3), [9.0, 13.0, *DIP[2:]]),
    "released": (policy("dtp", gate=10.0, gate_steps=3), DIP),
    "own scale": (policy("dtp", guidance_scale=2.0), DIP),
}


def run(
    policies: list[Policy], rows: list[list[tuple]], s: Schedule, scales: list[float], combine: Any = None
) -> tuple:
    """Guided outputs [K][B] and the report of a batch."""
    guide = Guide(policies, s, guidance_scale=scales[0], latents=torch.zeros(len(policies), *SHAPE))
    guided = []
    for k, scale in enumerate(scales):
        u, c = (torch.stack([image[k][i] for image in rows]) for i in (0, 1))
        guide.follow(scale)
        guided.append(guide(u, c, combined=None if combine is None else combine(u, c)))
    return guided, guide.report()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_guided_outputs_and_report_are_the_plain_loops(name: str, dtype: torch.dtype) -> None:
    p, norms = CASES[name]
    s, rows = schedule_of(), outputs(norms, dtype, seed=1)
    guided, report = run([p], [rows], s, [SCALE] * STEPS)
    expected, facts = plain(p, rows, s, [SCALE] * STEPS)
    for e, e64 in zip(guided, expected, strict=True):
        assert e.dtype == dtype
        assert (e[0].double() - e64).abs().max() <= DTYPES[dtype] * e64.abs().max()
    image = report[0]
    assert image.d_curve == pytest.approx(facts["curve"], rel=1e-5)
    assert image.transition_step == facts["transition"]
    assert (image.gate or {}).get("step") == facts["caught"]
    assert image.denoiser_rows == 2 * STEPS


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_a_noise_level_is_observed_once(kind: Any) -> None:
    s = schedule_of(kind, steps=8)
    norms = [9.0 - 0.5 * k + (k % 2) for k in range(len(s.timesteps))]  # every second row rises
    rows = outputs(norms, torch.float32, seed=2)
    guided, report = run([policy("paper-dtp")], [rows], s, [SCALE] * len(norms))
    expected, facts = plain(policy("paper-dtp"), rows, s, [SCALE] * len(norms))
    assert report[0].transition_step == facts["transition"]
    torch.testing.assert_close(torch.cat(guided).double(), torch.stack(expected), rtol=0, atol=2e-5)


def test_a_mixed_batch_is_its_single_images_bit_for_bit() -> None:
    s = schedule_of()
    policies = [p for p, _ in CASES.values()]
    rows = [outputs(norms, torch.float16, seed=b) for b, (_, norms) in enumerate(CASES.values())]
    together, report = run(policies, rows, s, [SCALE] * STEPS)
    for b, p in enumerate(policies):
        alone, single = run([p], [rows[b]], s, [SCALE] * STEPS)
        assert all(torch.equal(e[b], one[0]) for e, one in zip(together, alone, strict=True))
        assert report[b] == single[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_callers_own_combination_keeps_its_bits_where_nothing_is_guarded(dtype: torch.dtype) -> None:
    def combine(u: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (c + 3.7 * (c - u)) / 1.3  # neither linear with our scale nor rounded as we round

    s = schedule_of()
    names = ["cfg", "dynamic", "caught", "released", "own scale"]
    policies = [CASES[name][0] for name in names]
    rows = [outputs(DIP, dtype, seed=b) for b in range(len(names))]
    guided, report = run(policies, rows, s, [SCALE] * STEPS, combine)
    for b, name in enumerate(names):
        start = report[b].transition_step or 0
        expected, _ = plain(policies[b], rows[b], s, [SCALE] * STEPS)
        for k, e in enumerate(guided):
            if k >= start and name != "own scale":
                assert torch.equal(e[b], combine(*rows[b][k]))
            else:
                assert (e[b].double() - expected[k]).abs().max() <= DTYPES[dtype] * expected[k].abs().max()


def test_another_scale_holds_from_the_next_row_on() -> None:
    s, rows = schedule_of(), outputs(DIP, torch.float32, seed=3)
    scales = [5.0] * 4 + [3.0] * 4 + [7.0] * 4
    guided, report = run([policy("paper-og+dtp")], [rows], s, scales)
    expected, facts = plain(policy("paper-og+dtp"), rows, s, scales)
    torch.testing.assert_close(torch.cat(guided).double(), torch.stack(expected), rtol=0, atol=5e-5)
    assert report[0].transition_step == facts["transition"] == 5


def test_a_row_with_one_branch_passes_it_through_and_leaves_a_hole_in_the_curve() -> None:
    s, rows = schedule_of(), outputs(DIP, torch.float32, seed=4)
    guide = Guide([policy("stp")], s, guidance_scale=SCALE, latents=torch.zeros(1, *SHAPE))
    for k, (u, c) in enumerate(rows):
        alone = guide.plan.branches[k] == "uncond"
        e = guide(u[None], None if alone else c[None])
        assert not alone or torch.equal(e[0], u)
    image = guide.report()[0]
    before = sum(t > 500 for t in s.timesteps.tolist())
    assert 0 < before < STEPS
    assert [d is None for d in image.d_curve] == [k < before for k in range(STEPS)]
    assert image.denoiser_rows == 2 * STEPS - before


def test_what_is_handed_out_is_not_written_again() -> None:
    s, rows = schedule_of(), outputs(DIP, torch.float32, seed=5)
    guide = Guide([policy("cfg")], s, guidance_scale=SCALE, latents=torch.zeros(1, *SHAPE))
    first = guide(rows[0][0][None], rows[0][1][None])
    kept = first.clone()
    guide(rows[1][0][None], rows[1][1][None])
    assert torch.equal(first, kept)


def test_a_schedule_that_others_use_too_is_not_written_to() -> None:
    s = schedule_of(EulerDiscreteScheduler).with_own_step("as of a scheduler that is not linear")
    before = s.rows.clone()
    assert not torch.equal(before[:, Row.S], torch.ones(len(before), dtype=before.dtype))
    run([policy("dtp")], [outputs(DIP, torch.float32, seed=6)], s, [SCALE] * STEPS)
    assert torch.equal(s.rows, before)


def test_refusals() -> None:
    s = schedule_of(steps=2)
    with pytest.raises(ValueError, match="policies has 1 entries: must be one per image, 2"):
        Guide([policy("cfg")], s, guidance_scale=SCALE, latents=torch.zeros(2, *SHAPE))
    guide = Guide([policy("cfg")], s, guidance_scale=SCALE, latents=torch.zeros(1, *SHAPE))
    u = torch.zeros(1, *SHAPE)
    guide(u, u), guide(u, u)
    with pytest.raises(RuntimeError, match="all 2 rows"):
        guide(u, u)
