"""Schedulers, spacings and predictions for the tests of the schedule compiler, and its columns."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np

from fastguard.kernels.layout import Row
from fastguard.schedules.schedule import Schedule

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WITHOUT_BETAS = ("Flow", "EDM", "IPNDM")


@dataclass(frozen=True)
class Case:
    """One scheduler with its timesteps set, and the arguments of its step()."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    timesteps: Callable[[int], dict[str, Any]] = lambda steps: {"num_inference_steps": steps}

    def make(self, steps: int) -> Any:
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        kind = getattr(diffusers, self.name + "Scheduler")
        betas = {} if self.name.startswith(WITHOUT_BETAS) else SD_BETAS
        scheduler = kind(**{**betas, **self.config})
        scheduler.set_timesteps(**self.timesteps(steps))
        return scheduler

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in {**self.config, **self.step}.items()]
        return "-".join([self.name, *options]).replace("_prediction", "")


DDIM = Case("DDIM", {"clip_sample": False})


def column(schedule: Schedule, name: Row) -> np.ndarray:
    """One column of the table, without its inactive last row."""
    return schedule.rows[:-1, name].numpy()


def _product(name: str, step: dict[str, Any] | None = None, **options: Any) -> list[Case]:
    """One case per combination of the options that are given as lists."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    chosen = itertools.product(*lists.values())
    return [Case(name, dict(zip(lists, values, strict=True)), step or {}) for values in chosen]


def _all_cases() -> list[Case]:
    all_three = ["epsilon", "v_prediction", "sample"]
    two = all_three[:2]
    spacings = ["linspace", "leading", "trailing"]
    multi = "DPMSolverMultistep"
    flow: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    }
    zero_snr: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    v_zero_snr: dict[str, Any] = {"prediction_type": "v_prediction", **zero_snr}
    cases = [
        # no history
        *_product("DDIM", clip_sample=False, prediction_type=all_three, timestep_spacing=spacings),
        *_product("DDIM", {"eta": 0.7}, clip_sample=False, prediction_type=all_three),
        *_product("DDIM", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        *_product("DDIM", clip_sample=False, **v_zero_snr),
        *_product("DDPM", clip_sample=False, prediction_type=all_three),
        *_product("DDPM", clip_sample=False, variance_type=["fixed_large", "fixed_small_log"]),
        *_product("DDPM", clip_sample=False, **v_zero_snr),
        *_product("LCM", prediction_type=all_three),
        *_product("LCM", **v_zero_snr),
        *_product("TCD", prediction_type=all_three),
        *_product("TCD", {"eta": 0.9}),
        *_product("EulerDiscrete", prediction_type=all_three, timestep_spacing=spacings),
        *_product("EulerDiscrete", use_karras_sigmas=True, prediction_type=two),
        *_product("EulerDiscrete", use_exponential_sigmas=True),
        *_product("EulerDiscrete", use_beta_sigmas=True),
        *_product("EulerDiscrete", final_sigmas_type="sigma_min", interpolation_type="log_linear"),
        *_product("EulerDiscrete", prediction_type="epsilon", **zero_snr),
        *_product(
            "EulerDiscrete",
            {"s_churn": 20.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.01},
            prediction_type=two,
        ),
        *_product("EulerAncestralDiscrete", prediction_type=two, timestep_spacing=spacings),
        *_product("EulerAncestralDiscrete", prediction_type="epsilon", **zero_snr),
        *_product("FlowMatchEulerDiscrete", shift=[1.0, 3.0]),
        *_product("FlowMatchEulerDiscrete", use_karras_sigmas=True),
        *_product("FlowMatchEulerDiscrete", use_exponential_sigmas=True),
        *_product("FlowMatchEulerDiscrete", use_beta_sigmas=True),
        *_product("FlowMatchEulerDiscrete", stochastic_sampling=True),
        *_product("FlowMatchEulerDiscrete", invert_sigmas=True),
        *_product("EDMEuler", prediction_type=two, sigma_schedule=["karras", "exponential"]),
        *_product("EDMEuler", {"s_churn": 20.0}),
        # one
        *_product(multi, prediction_type=all_three, timestep_spacing=spacings),
        *_product(multi, use_karras_sigmas=True, prediction_type=two),
        *_product(multi, use_exponential_sigmas=True),
        *_product(multi, use_lu_lambdas=True),
        *_product(multi, **v_zero_snr),
        *_product(multi, solver_order=[2, 3], euler_at_final=True),
        *_product(
            multi,
            algorithm_type=["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"],
            solver_type=["midpoint", "heun"],
            solver_order=[1, 2],
            final_sigmas_type="sigma_min",
        ),
        *_product(
            multi,
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
            solver_type=["midpoint", "heun"],
        ),
        *_product(multi, solver_order=[1, 2, 3], **flow),
        *_product("DEISMultistep", solver_order=[1, 2, 3], prediction_type=all_three),
        *_product("DEISMultistep", use_karras_sigmas=True),
        *_product(
            "DPMSolverSinglestep",
            solver_order=[1, 2, 3],
            prediction_type=all_three,
            algorithm_type=["dpmsolver++"],
        ),
        *_product(
            "DPMSolverSinglestep",
            solver_order=[2, 3],
            algorithm_type=["dpmsolver++", "dpmsolver"],
            solver_type=["midpoint", "heun"],
            final_sigmas_type="sigma_min",
        ),
        *_product("DPMSolverSinglestep", use_karras_sigmas=True, solver_order=[2, 3]),
        *_product("DPMSolverSinglestep", solver_order=[2, 3], **flow),
        *_product("HeunDiscrete", prediction_type=all_three),
        *_product("HeunDiscrete", use_karras_sigmas=True),
        *_product("FlowMatchHeunDiscrete", shift=3.0),
        *_product("KDPM2Discrete", prediction_type=two),
        *_product("KDPM2Discrete", use_karras_sigmas=True),
        *_product("KDPM2AncestralDiscrete", prediction_type=two),
        *_product("KDPM2AncestralDiscrete", use_karras_sigmas=True),
        *_product("EDMDPMSolverMultistep", prediction_type=two, solver_order=[2, 3]),
        *_product("EDMDPMSolverMultistep", algorithm_type="sde-dpmsolver++"),
        # two and three
        *_product(
            multi,
            solver_order=3,
            algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
            prediction_type=all_three,
        ),
        *_product(multi, solver_order=3, prediction_type="sample", final_sigmas_type="sigma_min"),
        *_product(multi, solver_order=3, lower_order_final=False, prediction_type="v_prediction"),
        *_product("UniPCMultistep", solver_order=[1, 2, 3], prediction_type=all_three),
        *_product("UniPCMultistep", solver_order=[2, 3], use_karras_sigmas=True),
        *_product(
            "UniPCMultistep",
            solver_order=[2, 3],
            solver_type=["bh1", "bh2"],
            predict_x0=[True, False],
            final_sigmas_type="sigma_min",
        ),
        *_product("UniPCMultistep", solver_order=[2, 3], disable_corrector=[[0, 1, 5]]),
        *_product("UniPCMultistep", solver_order=[2, 3], **flow),
        *_product("SASolver", prediction_type=all_three),
        *_product("SASolver", predictor_order=[1, 3], corrector_order=[1, 3]),
        *_product("SASolver", use_karras_sigmas=True),
        *_product("SASolver", **flow),
        *_product("LMSDiscrete", prediction_type=all_three),
        *_product("LMSDiscrete", use_beta_sigmas=True),
        *_product("IPNDM"),
        *_product("PNDM", skip_prk_steps=True, prediction_type=two, timestep_spacing=spacings),
        *_product("PNDM", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    ]
    return cases


def _custom(steps: int) -> list[int]:
    """Uneven timesteps, denser at the end."""
    return sorted({round(999 * (i / steps) ** 1.5) for i in range(1, steps + 1)}, reverse=True)


def _custom_sigmas(largest: float) -> Callable[[int], dict[str, Any]]:
    return lambda steps: {"sigmas": np.geomspace(largest, largest / 400, steps)}


CASES = _all_cases()
CUSTOM = [
    Case(name, config, {}, lambda steps: {"timesteps": _custom(steps)})
    for name, config in [
        ("DDPM", {"clip_sample": False}),
        ("TCD", {}),
        ("LCM", {}),
        ("EulerDiscrete", {}),
        ("DPMSolverMultistep", {}),
        ("DPMSolverSinglestep", {}),
        ("HeunDiscrete", {}),
    ]
] + [
    Case("EulerDiscrete", {}, {}, _custom_sigmas(14.6)),
    Case("FlowMatchEulerDiscrete", {"shift": 2.0}, {}, _custom_sigmas(1.0)),
    Case(
        "UniPCMultistep",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        {},
        _custom_sigmas(0.99),
    ),
    Case(
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True},
        {},
        lambda steps: {"num_inference_steps": steps, "mu": 0.8},
    ),
]
LATE = [
    Case("DDIM", {"clip_sample": False}),
    Case("DDPM", {"clip_sample": False}),
    Case("PNDM", {"skip_prk_steps": True}),
    Case("EulerDiscrete"),
    Case("EulerDiscrete", {"use_karras_sigmas": True}),
    Case("EulerAncestralDiscrete"),
    Case("LCM"),
    Case("FlowMatchEulerDiscrete", {"shift": 3.0}),
    Case("DPMSolverMultistep"),
    Case("DPMSolverMultistep", {"solver_order": 3, "use_karras_sigmas": True}),
    Case("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    Case("DEISMultistep"),
    Case("DPMSolverSinglestep", {"solver_order": 2}),
    Case("DPMSolverSinglestep", {"solver_order": 3}),
    Case("HeunDiscrete"),
    Case("FlowMatchHeunDiscrete"),
    Case("KDPM2Discrete"),
    Case("KDPM2AncestralDiscrete"),
    Case("UniPCMultistep", {"solver_order": 3}),
    Case("SASolver"),
    Case("LMSDiscrete"),
    Case("IPNDM"),
    Case("EDMEuler"),
    Case("EDMDPMSolverMultistep"),
]
