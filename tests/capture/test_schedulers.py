"""Every scheduler under every kind of policy, as steps and as a whole, against the same call run eagerly, bit for bit."""

from __future__ import annotations

import diffusers as d
import pytest

from tests import pipelines, schedulers
from tests.capture.calls import POLICIES, check, eager
from tests.pipelines import BETAS, ddim

pytestmark = pytest.mark.usefixtures("recorders")

# Others than tests/schedulers.py has: options that change which rows draw, how far back a row looks, where the last one ends.
MORE = {
    "ddim-eta": ddim,
    "lms-karras": lambda: d.LMSDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "lms-beta": lambda: d.LMSDiscreteScheduler(**BETAS, use_beta_sigmas=True),
    "lms-v": lambda: d.LMSDiscreteScheduler(**BETAS, prediction_type="v_prediction"),
    "lms-sample": lambda: d.LMSDiscreteScheduler(**BETAS, prediction_type="sample"),
    "unipc-bh1": lambda: d.UniPCMultistepScheduler(**BETAS, solver_type="bh1", final_sigmas_type="sigma_min"),
    "dpm-3m-sigma-min": lambda: d.DPMSolverMultistepScheduler(**BETAS, solver_order=3, final_sigmas_type="sigma_min"),
    "dpm-single-sde-2": lambda: d.DPMSolverSinglestepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"),
}
LINEAR = {**schedulers.SD, **MORE}


# The third decides at every row, so it stands for the others where time is short, and anchors have two schedulers, without history and
# with; `test_graphed.py` has every policy under one scheduler.
SHORT = {*((name, 2) for name in LINEAR), ("ddim", 4), ("dpm-2m", 4)}
EACH = [
    pytest.param(name, policy, marks=[] if (name, n) in SHORT else pytest.mark.slow, id=f"{name}-{n}")
    for name in LINEAR
    for n, policy in enumerate(POLICIES)
]


@pytest.mark.parametrize(("name", "policy"), EACH)
def test_schedulers(sd, name, policy):
    sd.scheduler = LINEAR[name]()
    policy = schedulers.suited(name, policy)
    kwargs = {"steps": 4 if "3" in name else 3, **({"eta": 1.0} if name == "ddim-eta" else {})}
    against = eager(sd, policy, **kwargs)
    for mode in ("step", "loop"):
        check(sd, policy, mode, against=against, **kwargs)


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_ddim_that_clips(sd, policy):
    sd.scheduler = ddim(clip_sample=True)
    against = eager(sd, policy)
    for mode in ("step", "loop"):
        check(sd, policy, mode, path="own step, step graph", against=against)


@pytest.mark.parametrize("policy", ["og+dtp", pytest.param("anchored", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", schedulers.OWN_STEP)
def test_schedulers_with_a_step_of_their_own(name, policy):
    """Denoiser, decision and guidance are recorded, the scheduler's own step() runs."""
    pipe = pipelines.sd(scheduler=schedulers.OWN_STEP[name]())
    for mode in ("step", "loop"):
        check(pipe, policy, mode, path="own step, step graph", steps=50)
