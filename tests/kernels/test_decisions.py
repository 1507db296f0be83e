"""Decisions of the fused op against an independent reference, on random curves and on named ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy

from .curves import INF, NAN, Schedule, check, run

# Random curves -------------------------------------------------------------------------------------------------------------

# A byte picks the root of d. Few distinct values, so that plateaus and ties are common; the others have twelve bits at most, so
# that their square is exact in float32, or are extreme.
ROOTS = [float(n % 7) for n in range(128)] + [n * n / 256 for n in range(2, 64)] + [n / 256 for n in range(1, 61)]
ROOTS += [NAN, INF, 2.0**62, 2.0**70, 2.0**-70, -3.0]
assert len(ROOTS) == 256
TIMESTEPS = st.integers(0, 12).map(float)

common = {
    "before": st.one_of(st.sampled_from(["zero", "conditional", "opposite"]), st.sampled_from([-2.0, 0.5])),
    "gate_steps": st.integers(1, 5),
    "gate": st.one_of(st.integers(1, 24).map(lambda n: n / 4), st.floats(1e-3, 16)),
    "guidance_scale": st.one_of(st.none(), st.sampled_from([0.0, 1.0, 7.5])),
}
dynamic = {
    "transition": st.just("dynamic"),
    "deadline": st.one_of(st.none(), TIMESTEPS),
    "magnitude": st.sampled_from(["output", "epsilon", "x0"]),
    "min_step": st.one_of(st.just(0), st.integers(0, 6)),
}
minimum = {"min_drop": st.one_of(st.just(0.0), st.floats(0, 0.99))}
drop = {"rule": st.just("drop"), "rho": st.floats(0.05, 0.95)}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    kinds = [
        {"transition": st.none(), "guidance_scale": common["guidance_scale"]},
        {**common, "transition": st.just("static"), "t_star": TIMESTEPS, "monitor": st.booleans()},
        {**common, **dynamic, **minimum},
        {**common, **dynamic, **minimum},
        {**common, **dynamic, **drop},
    ]
    values = {name: draw(strategy) for name, strategy in draw(st.sampled_from(kinds)).items()}
    if "gate" in values and draw(st.booleans()):
        del values["gate"], values["gate_steps"]
    if values.get("before") in ("opposite", -2.0) and draw(st.booleans()):
        values["opposite_steps"] = draw(st.integers(0, 6))
    return Policy(**values)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Policy], list[list[float]], Schedule, int]:
    steps = draw(st.integers(1, 14))
    each = st.binary(min_size=steps, max_size=steps).map(lambda picks: [ROOTS[n] for n in picks])
    weights = st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 4.0]), min_size=steps, max_size=steps)
    schedule = Schedule(
        times=sorted((draw(TIMESTEPS) for _ in range(steps)), reverse=True),
        observe=draw(st.one_of(st.just([True] * steps), st.lists(st.booleans(), min_size=steps, max_size=steps))),
        w_epsilon=draw(weights),
        w_x0=draw(weights),
    )
    chosen = draw(st.lists(policies(), min_size=1, max_size=12))
    return chosen, [draw(each) for _ in chosen], schedule, draw(st.sampled_from([1, 3, 64]))


@settings(max_examples=500, deadline=None)
@given(cases())
def test_decisions_equal_the_reference(case):
    """Thousands of curves: plateaus, NaN, infinities, rows that are no observations, every policy, and other samples beside."""
    for kind in check(*case):
        event(kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@settings(max_examples=100, deadline=None)
@given(cases())
def test_decisions_on_the_device(case):
    check(*case, device="cuda")


# Named curves --------------------------------------------------------------------------------------------------------------


def plain_schedule(steps: int) -> Schedule:
    """DDIM's grid of 50 steps from t = 999 - 20 (as in the paper's figure 2), each row an observation."""
    return Schedule([979.0 - 20 * k for k in range(steps)], [True] * steps, [1.0] * steps, [1.0] * steps)


def outcome(p: Policy, roots: list[float], s: Schedule | None = None):
    s = s or plain_schedule(len(roots))
    check([p], [roots], s)
    return run([p], [roots], s, 1)[1][0]


def test_the_papers_figure():
    """Minimum at t = 779, guidance on from t = 759."""
    image = outcome(policy("paper-dtp"), [9, 8.5, 8, 7, 6, 5, 4, 3, 2.5, 2, 1, 1.5, 2, 2.5])
    assert (image.minimum_timestep, image.transition_timestep) == (779, 759)
    assert image.margin == pytest.approx(1 - 1 / 2.25)
    assert not image.forced


def test_plateaus_and_edges():
    bare = policy("paper-dtp")
    assert outcome(bare, [3, 2, 2, 3, 4]).transition_step is None, "a plateau is no strict minimum"
    assert outcome(bare, [3, 2, 3]).transition_step == 2, "the earliest possible"
    assert outcome(bare, [2, 3, 4, 5]).transition_step is None, "the first observation has one neighbour only"
    assert outcome(bare, [3, NAN, 2, 3, 1, 2]).transition_step == 5, "a NaN neighbour hides the minimum beside it"
    assert outcome(bare, [5, 4, 3, 2, 1]).transition_step is None, "monotone"


def test_deadline():
    forced = outcome(policy("dtp", deadline=919), [5, 4, 3, 2, 1])
    assert (forced.transition_step, forced.forced, forced.margin) == (3, True, None)
    both = outcome(policy("dtp", deadline=919), [5, 4, 3, 4, 1])
    assert (both.transition_step, both.forced) == (3, False), "the rule fires in the deadline's own row: not forced"


def test_gate():
    gated = policy("paper-dtp", gate=4.0, gate_steps=3)
    late = outcome(gated, [3, 2, 4, 5, 4, 6])
    assert (late.gate["step"], late.transition_step) == (2, 2), "caught at the very row at which the rule fires"
    assert outcome(gated, [3, 3.5, 3.75, 9, 1, 2]).gate == {
        "caught": False,
        "rms": 3.75,
        "threshold": 4.0,
        "step": None,
    }
    assert outcome(policy("dtp", gate=4.0, gate_steps=5, deadline=979), [3, 3, 4, 1]).transition_step == 2


def test_unobserved_rows_hold():
    """A second evaluation of a noise level (PNDM's row 2) is not looked at: it would make a false minimum of row 1."""
    s = plain_schedule(6)
    roots = [5.0, 4.0, 4.5, 3.0, 2.0, 1.0]
    assert outcome(policy("paper-dtp"), roots, s).transition_step == 2
    s.observe[2] = False
    assert outcome(policy("paper-dtp"), roots, s).transition_step is None


def test_min_step_and_min_drop():
    roots = [8.0, 7.0, 7.5, 6.0, 2.0, 3.0]
    assert outcome(policy("paper-dtp"), roots).transition_step == 2
    assert outcome(policy("paper-dtp", min_step=2), roots).transition_step == 5
    assert outcome(policy("paper-dtp", min_drop=0.5), roots).transition_step == 5
    assert outcome(policy("paper-dtp", min_drop=0.95), roots).transition_step is None


def test_drop_rule_in_x0_space():
    s = plain_schedule(5)
    s.w_x0 = [4.0, 2.0, 1.0, 0.5, 0.25]
    made = Policy(transition="dynamic", rule="drop", rho=0.25, magnitude="x0")
    image = outcome(made, [2.0, 2.0, 2.0, 2.0, 2.0], s)
    assert (image.transition_step, image.minimum_step) == (3, None), "4 -> 16, 8, 4, 2: below a quarter at the fourth"
