"""`python -m bench.schedulers_page`: what the compiler makes of diffusers' schedulers, as the Markdown of docs/schedulers.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers

from fastguard.kernels.layout import Row
from fastguard.schedules.compiler import compile_schedule
from fastguard.schedules.schedule import Schedule

STEPS = 50
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# (what, class, options, arguments of step)
SCHEDULERS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("DDIM", "DDIM", {"clip_sample": False}, {}),
    ("DDIM, eta 1", "DDIM", {"clip_sample": False}, {"eta": 1.0}),
    ("DDPM", "DDPM", {"clip_sample": False}, {}),
    ("Euler", "EulerDiscrete", {}, {}),
    ("Euler, churn", "EulerDiscrete", {}, {"s_churn": 20.0}),
    ("Euler ancestral", "EulerAncestralDiscrete", {}, {}),
    ("LCM", "LCM", {}, {}),
    ("TCD", "TCD", {}, {}),
    ("Flow matching Euler", "FlowMatchEulerDiscrete", {"shift": 3.0}, {}),
    ("EDM Euler", "EDMEuler", {}, {}),
    ("DPM-Solver++ 2M", "DPMSolverMultistep", {}, {}),
    ("DPM-Solver++ SDE 2M", "DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("EDM DPM-Solver++ 2M", "EDMDPMSolverMultistep", {}, {}),
    ("DEIS 2", "DEISMultistep", {}, {}),
    ("DPM-Solver++ single-step 2", "DPMSolverSinglestep", {}, {}),
    ("Heun", "HeunDiscrete", {}, {}),
    ("Flow matching Heun", "FlowMatchHeunDiscrete", {}, {}),
    ("KDPM2", "KDPM2Discrete", {}, {}),
    ("KDPM2 ancestral", "KDPM2AncestralDiscrete", {}, {}),
    ("DPM-Solver++ single-step 3", "DPMSolverSinglestep", {"solver_order": 3}, {}),
    ("DPM-Solver++ 3M", "DPMSolverMultistep", {"solver_order": 3}, {}),
    (
        "DPM-Solver++ SDE 3M",
        "DPMSolverMultistep",
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        {},
    ),
    ("DEIS 3", "DEISMultistep", {"solver_order": 3}, {}),
    ("UniPC 2", "UniPCMultistep", {}, {}),
    ("SA-Solver", "SASolver", {}, {}),
    ("UniPC 3", "UniPCMultistep", {"solver_order": 3}, {}),
    ("LMS 4", "LMSDiscrete", {}, {}),
    ("LMS 4, v", "LMSDiscrete", {"prediction_type": "v_prediction"}, {}),
    ("IPNDM", "IPNDM", {}, {}),
    ("PNDM", "PNDM", {"skip_prk_steps": True}, {}),
    ("DDIM, clip_sample", "DDIM", {}, {}),
    ("DPM-Solver++ 2M, thresholding", "DPMSolverMultistep", {"thresholding": True}, {}),
    ("PNDM with Runge-Kutta steps", "PNDM", {}, {}),
    ("UniPC 2, bh1, to sigma 0", "UniPCMultistep", {"solver_type": "bh1"}, {}),
    (
        "DPM-Solver++ 3M, to sigma_min",
        "DPMSolverMultistep",
        {"solver_order": 3, "final_sigmas_type": "sigma_min"},
        {},
    ),
    (
        "DPM-Solver++ SDE single-step 2",
        "DPMSolverSinglestep",
        {"algorithm_type": "sde-dpmsolver++"},
        {},
    ),
]

HEADER = f"""# Schedulers

Written by `python -m bench.schedulers_page` ({STEPS} steps). One row of a table is one denoiser evaluation:

    m = P x + Q e;    x' = A x + B m + sum_j H_j history[j] + N z;    history[STORE] = m

*m* is what is remembered: the guided output *e* itself, the x0-prediction made of it, or the output as the scheduler converts it.
*History* counts the remembered tensors. *x0* gives X and E of the first, the middle and the last row in x0(e) = X x + E e, with x and e the
latents and the output of that row; checked against the scheduler's own add_noise. *Residual* is the largest difference from the scheduler's own step, relative to the largest
value of x', all in float64; *float32* the same with the table in float32.

| scheduler | m | history | noise | x0: first | middle | last | residual | float32 |
|---|---|---|---|---|---|---|---|---|"""

REFUSED = """
## Own step

These run the scheduler's own `step()` on the guided output, outside the fused operation:

| scheduler | x0: first | middle | last | why |
|---|---|---|---|---|"""

NAMES = {"epsilon": "e", "x0": "x0", "converted": "converted e", "free": "from the coefficients"}


def schedules() -> Iterator[tuple[str, Schedule]]:
    for what, name, options, step in SCHEDULERS:
        betas = {} if name.startswith(("Flow", "EDM", "IPNDM")) else SD
        scheduler = getattr(diffusers, name + "Scheduler")(**{**betas, **options})
        scheduler.set_timesteps(STEPS)
        yield what, compile_schedule(scheduler, step_kwargs=step)


def markdown() -> str:
    fused, own = [HEADER], [REFUSED]
    for what, s in schedules():
        if s.linear:
            noise = "yes" if any(s.draws) else ""
            cells = (what, NAMES[s.form], s.history, noise, *_x0(s), f"{s.residual:.0e}", f"{s.rounding:.1e}")
            fused.append("| " + " | ".join(map(str, cells)) + " |")
        else:
            own.append("| " + " | ".join((what, *_x0(s), str(s.reason))) + " |")
    return "\n".join([*fused, *own]) + "\n"


def _x0(s: Schedule) -> tuple[str, ...]:
    pairs = s.rows[[0, len(s.timesteps) // 2, len(s.timesteps) - 1], Row.X : Row.E + 1].tolist()
    return tuple(f"{x:.4g}, {e:.4g}" for x, e in pairs)


if __name__ == "__main__":
    print(markdown(), end="")
