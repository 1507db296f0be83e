"""Every scheduler of diffusers that the table covers, as the tests use them: name -> factory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers as d

from fastguard import Policy, policy
from tests.pipelines import BETAS, ddim

_MULTISTEP = d.DPMSolverMultistepScheduler

SD: dict[str, Callable[[], Any]] = {
    "ddim": ddim,
    "ddim-v": lambda: ddim(prediction_type="v_prediction"),
    "ddim-sample": lambda: ddim(prediction_type="sample"),
    "ddim-zero-snr": lambda: ddim(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "ddpm": lambda: d.DDPMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    "euler": lambda: d.EulerDiscreteScheduler(**BETAS, steps_offset=1),
    "euler-karras": lambda: d.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True),
    "euler-v": lambda: d.EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"),
    "euler-ancestral": lambda: d.EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1),
    "lcm": lambda: d.LCMScheduler(**BETAS, clip_sample=False),
    "tcd": lambda: d.TCDScheduler(**BETAS, clip_sample=False),
    "dpm-2m": lambda: _MULTISTEP(**BETAS, steps_offset=1),
    "dpm-2m-karras": lambda: _MULTISTEP(**BETAS, use_karras_sigmas=True),
    "dpm-2m-exponential": lambda: _MULTISTEP(**BETAS, use_exponential_sigmas=True),
    "euler-beta": lambda: d.EulerDiscreteScheduler(**BETAS, use_beta_sigmas=True),
    "dpm-2m-heun": lambda: _MULTISTEP(**BETAS, solver_type="heun"),
    "dpm-2m-noise": lambda: _MULTISTEP(**BETAS, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "dpm-sde-2m": lambda: _MULTISTEP(**BETAS, algorithm_type="sde-dpmsolver++"),
    "dpm-sde-3m": lambda: _MULTISTEP(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=3),
    "dpm-3m": lambda: _MULTISTEP(**BETAS, solver_order=3),
    "dpm-single-2": lambda: d.DPMSolverSinglestepScheduler(**BETAS),
    "dpm-single-3": lambda: d.DPMSolverSinglestepScheduler(**BETAS, solver_order=3),
    "deis-2": lambda: d.DEISMultistepScheduler(**BETAS),
    "deis-3": lambda: d.DEISMultistepScheduler(**BETAS, solver_order=3),
    "unipc-2": lambda: d.UniPCMultistepScheduler(**BETAS),
    "unipc-3": lambda: d.UniPCMultistepScheduler(**BETAS, solver_order=3),
    "sa-solver": lambda: d.SASolverScheduler(**BETAS),
    "heun": lambda: d.HeunDiscreteScheduler(**BETAS),
    "kdpm2": lambda: d.KDPM2DiscreteScheduler(**BETAS),
    "kdpm2-ancestral": lambda: d.KDPM2AncestralDiscreteScheduler(**BETAS),
    "lms": lambda: d.LMSDiscreteScheduler(**BETAS),
    "ipndm": lambda: d.IPNDMScheduler(),
    "pndm": lambda: d.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
    "edm-euler": lambda: d.EDMEulerScheduler(),
    "edm-dpm": lambda: d.EDMDPMSolverMultistepScheduler(),
}

# float32 arithmetic of their own that no table repeats to 1e-6 (tests/schedules/test_schedule.py): their own step() runs
OWN_STEP: dict[str, Callable[[], Any]] = {
    "euler-v-zero-snr": lambda: d.EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "lms-exponential": lambda: d.LMSDiscreteScheduler(**BETAS, use_exponential_sigmas=True),
}

NOT_IN_STEPS = ("ipndm", "edm-euler", "edm-dpm")  # timesteps that count no training steps: no t_star or deadline there


def suited(name: str, chosen: str | Policy, **fields: Any) -> Policy:
    """The policy, for a scheduler of `NOT_IN_STEPS` with the bare rule in place of its limit."""
    made = policy(chosen, **fields)
    if name not in NOT_IN_STEPS or made.transition is None:
        return made
    return replace(made, transition="dynamic", t_star=None, deadline=None)


FLOW: dict[str, Callable[[], Any]] = {
    "flow-euler": lambda: d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-heun": lambda: d.FlowMatchHeunDiscreteScheduler(shift=3.0),
}
