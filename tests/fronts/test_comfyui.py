"""The ComfyUI nodes against ComfyUI's calling contract (`tests.fronts.comfy`) and a plain loop over what the guard was shown."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from fastguard.fronts.comfyui.node import MemorizationGuard
from fastguard.fronts.comfyui.patch import Guarded
from fastguard.kernels.layout import Rule
from fastguard.loop.loop import Loop
from fastguard.policies.plan import lower
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from fastguard.schedules.compiler import compile_schedule
from tests.fronts import comfy

CFG = 7.5
SAMPLERS = [comfy.euler, comfy.heun, comfy.rounded, comfy.dpm_2, comfy.ancestral, comfy.churned]


def spied(patcher: comfy.Patcher) -> list[dict[str, Any]]:
    """What the guard is asked in every evaluation, and what it answers."""
    (guard,) = patcher.model_options["sampler_post_cfg_function"]
    seen: list[dict[str, Any]] = []

    def spy(args: dict[str, Any]) -> torch.Tensor:
        result = guard(args)
        seen.append({**args, "result": result, "sigma": float(args["sigma"][0])})
        return result

    patcher.model_options["sampler_post_cfg_function"] = [spy]
    return seen


def expected(
    p: Policy, seen: list[dict], b: int, schedule: torch.Tensor, times: Any
) -> tuple[list[float | None], int | None]:
    """Per evaluation the g that image b must get (None: ComfyUI's own output), and the evaluation of its transition. Float64."""
    state = "plain" if p.transition is None else "before" if p.gate is None else "undecided"
    curve: list[float] = []
    reached, wanted, transition = 0, [], None
    for k, args in enumerate(seen):
        delta = (args["cond_denoised"][b].double() - args["uncond_denoised"][b].double()) / args["sigma"]
        level = sum(float(s) >= args["sigma"] * (1 - 1e-6) for s in schedule)
        if k == 0 or level > reached:  # the first evaluation at or below a sigma of the schedule
            reached = level
            curve.append(float(delta.square().sum()))
            if state == "undecided":
                caught = math.sqrt(curve[-1] / delta.numel()) >= p.gate
                state = "before" if caught else "plain" if len(curve) == p.gate_steps else state
            limit = p.t_star if p.transition == "static" else p.deadline
            fired = p.transition == "dynamic" and len(curve) > 2 and curve[-3] > curve[-2] < curve[-1]
            if state == "before" and (fired or (limit is not None and times(args["sigma"]) <= limit)):
                state, transition = "after", k
        before = {"zero": 0.0, "conditional": 1.0, "opposite": -CFG}.get(p.before, p.before)
        wanted.append(before if state == "before" else p.guidance_scale)
    return wanted, transition


POLICIES = [
    policy("cfg"),
    policy("stp"),
    policy("og+stp"),
    policy("dtp"),
    policy("paper-og+dtp"),
    policy("released-dtp"),
    policy("dtp", gate=2.6),
    policy("dtp", gate=2.6, gate_steps=3),
    policy("paper-dtp", guidance_scale=3.0),
]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_evaluation_is_the_plain_loops(sampler: Any) -> None:
    patcher, sampling = comfy.guarded(Policy.stack(POLICIES)), comfy.Discrete()
    seen = spied(patcher)
    comfy.sample(patcher, sampler, comfy.SIGMAS, batch=len(POLICIES))
    transitions = set()
    for b, p in enumerate(POLICIES):
        wanted, transition = expected(
            p, seen, b, comfy.SIGMAS, lambda sigma: float(sampling.timestep(torch.tensor([sigma]))[0])
        )
        transitions.add(transition)
        for g, args in zip(wanted, seen, strict=True):
            if g is None:
                assert torch.equal(args["result"][b], args["denoised"][b])
            else:
                u, c = args["uncond_denoised"][b].double(), args["cond_denoised"][b].double()
                torch.testing.assert_close(args["result"][b].double(), u + g * (c - u), rtol=1e-5, atol=2e-4)
    assert len(transitions) > 3  # the images differ


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_report_counts_a_sigma_once(sampler: Any) -> None:
    patcher = comfy.guarded(policy("paper-dtp"))
    (guard,) = patcher.model_options["sampler_post_cfg_function"]
    seen = spied(patcher)
    comfy.sample(patcher, sampler, comfy.SIGMAS)
    image = guard.report[0]
    _, transition = expected(policy("paper-dtp"), seen, 0, comfy.SIGMAS, None)
    assert image.transition_step == transition is not None
    deltas = [(args["cond_denoised"] - args["uncond_denoised"]) / args["sigma"] for args in seen]
    assert image.d_curve == pytest.approx([float(delta.square().sum()) for delta in deltas], rel=1e-5)
    assert image.denoiser_rows == 2 * len(seen)


def test_a_mixed_batch_is_its_single_images_bit_for_bit() -> None:
    together = comfy.sample(comfy.guarded(Policy.stack(POLICIES[:3])), comfy.heun, comfy.SIGMAS, batch=3)
    for b in range(3):
        alone = comfy.sample(comfy.guarded(Policy.stack([POLICIES[b]] * 3)), comfy.heun, comfy.SIGMAS, batch=3)
        assert torch.equal(together[b], alone[b])


def test_plain_guidance_and_released_images_keep_the_bits() -> None:
    stock = comfy.sample(comfy.Patcher(comfy.Model(comfy.Discrete(), comfy.dip)), comfy.heun, comfy.SIGMAS, batch=2)
    for chosen in (policy("cfg"), policy("dtp", gate=100.0)):
        assert torch.equal(comfy.sample(comfy.guarded(chosen), comfy.heun, comfy.SIGMAS, batch=2), stock)


def test_another_nodes_guidance_is_kept_for_unguarded_images() -> None:
    def halved(args: dict[str, Any]) -> torch.Tensor:
        return args["denoised"] * 0.5 + args["cond_denoised"] * 0.5

    def patched(chosen: Policy) -> comfy.Patcher:
        patcher = comfy.Patcher(comfy.Model(comfy.Discrete(), comfy.dip))
        patcher.set_model_sampler_cfg_function(lambda args: args["uncond"] + 3.0 * (args["cond"] - args["uncond"]))
        patcher.set_model_sampler_post_cfg_function(halved)
        patcher.set_model_sampler_post_cfg_function(Guarded(chosen), disable_cfg1_optimization=True)
        return patcher

    unguarded, zero = policy("dtp", gate=100.0), policy("stp", t_star=0)
    stock = comfy.sample(patched(policy("cfg")), comfy.euler, comfy.SIGMAS, batch=2)
    mixed = comfy.sample(patched(Policy.stack([unguarded, zero])), comfy.euler, comfy.SIGMAS, batch=2)
    assert torch.equal(mixed[0], stock[0])
    model = comfy.Model(comfy.Discrete(), lambda b, sigma: 0.0)  # c = u: unconditional
    torch.testing.assert_close(mixed[1], comfy.sample(comfy.Patcher(model), comfy.euler, comfy.SIGMAS, batch=2)[1])


@pytest.mark.parametrize("share_options", [False, True])
def test_every_run_decides_anew(share_options: bool) -> None:
    chosen = policy("dtp", gate=2.6)
    patcher = comfy.guarded(chosen)
    alone = {batch: comfy.sample(comfy.guarded(chosen), comfy.heun, comfy.SIGMAS, batch=batch) for batch in (1, 3)}
    for batch in (3, 3, 1, 3):
        result = comfy.sample(patcher, comfy.heun, comfy.SIGMAS, batch=batch, share_options=share_options)
        assert torch.equal(result, alone[batch])
    comfy.sample(patcher, lambda denoise, x, sigmas: denoise(x, sigmas[0]), comfy.SIGMAS, batch=3)  # interrupted
    assert torch.equal(comfy.sample(patcher, comfy.heun, comfy.SIGMAS, batch=1), alone[1])
    late = comfy.sample(patcher, comfy.heun, comfy.SIGMAS[3:], batch=3)  # image to image
    assert torch.equal(late, comfy.sample(comfy.guarded(chosen), comfy.heun, comfy.SIGMAS[3:], batch=3))


def test_the_guard_follows_the_cfg_of_the_evaluation() -> None:
    def rising(denoise: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        for k, sigma in enumerate(sigmas[:-1]):
            u, c = model.predict(x, sigma[None], [["negative"], ["positive"]])
            shared = {
                "cond_scale": 2.0 + k,
                "model": model,
                "model_options": {},
                "sigma": sigma[None],
                "uncond": ["negative"],
            }
            e = guard({**shared, "cond_denoised": c, "uncond_denoised": u, "denoised": u + (2.0 + k) * (c - u)})
            g = (2.0 + k) * (1 if guard.report[0].transition_step is not None else -1)
            torch.testing.assert_close(e, u + g * (c - u), rtol=1e-5, atol=2e-4)
        return x

    model, guard = comfy.Model(comfy.Discrete(), comfy.dip), Guarded(policy("paper-og+dtp"))
    comfy.sample(comfy.Patcher(model), rising, comfy.SIGMAS)
    assert guard.report[0].transition_step


def test_at_cfg_1_both_branches_run(tmp_path: Path) -> None:
    path = str(policy("stp", t_star=0).save(tmp_path / "p.json"))
    (patcher,) = MemorizationGuard().patch(comfy.Patcher(comfy.Model(comfy.Discrete(), comfy.dip)), "cfg", 0.0, path)
    zero = comfy.Model(comfy.Discrete(), lambda b, sigma: 0.0)
    expected = comfy.sample(comfy.Patcher(zero), comfy.euler, comfy.SIGMAS)
    torch.testing.assert_close(comfy.sample(patcher, comfy.euler, comfy.SIGMAS, cfg=1.0), expected)


def test_without_a_negative_branch_a_guard_is_refused() -> None:
    for negative in (None, []):
        with pytest.raises(ValueError, match="policy 'dtp': this sampler runs no negative branch"):
            comfy.sample(comfy.guarded(policy("dtp")), comfy.euler, comfy.SIGMAS, negative=negative)
        comfy.sample(comfy.guarded(policy("cfg")), comfy.euler, comfy.SIGMAS, negative=negative)


@pytest.mark.parametrize(("sampling", "sigmas"), [(comfy.Flow(), 1.0), (comfy.Flow(1.0), 1.0)])
def test_flow_models_have_thousandths_for_timesteps_and_velocities_for_d(sampling: Any, sigmas: float) -> None:
    patcher = comfy.guarded(policy("stp", t_star=500), comfy.Model(sampling, comfy.dip))
    (guard,) = patcher.model_options["sampler_post_cfg_function"]
    seen = spied(patcher)
    comfy.sample(patcher, comfy.euler, torch.linspace(sigmas, 0, 11))
    image = guard.report[0]
    assert image.timesteps == pytest.approx([1000 * args["sigma"] for args in seen], rel=1e-5)
    assert image.transition_step == 5
    assert image.d_curve[0] == pytest.approx(
        float((seen[0]["cond_denoised"] - seen[0]["uncond_denoised"]).square().sum())
    )


@pytest.mark.parametrize("magnitude", ["epsilon", "x0"])
@pytest.mark.parametrize("sampling", [comfy.Discrete(), comfy.Flow()])
def test_statistics_in_other_spaces(magnitude: str, sampling: Any) -> None:
    flow = isinstance(sampling, comfy.Flow)
    sigmas = torch.linspace(1, 0, 11) if flow else comfy.SIGMAS
    size = (lambda b, sigma: sigma) if flow else (lambda b, sigma: 1.0)
    patcher = comfy.guarded(policy("paper-dtp", rule="drop", rho=0.3, magnitude=magnitude), comfy.Model(sampling, size))
    (guard,) = patcher.model_options["sampler_post_cfg_function"]
    comfy.sample(patcher, comfy.euler, sigmas)
    levels = [float(s) for s in sigmas[:-1]]
    weights = [s**2 if magnitude == "x0" else (1 - s) ** 2 if flow else 1.0 for s in levels]
    statistic = [w * size(0, s) ** 2 for w, s in zip(weights, levels, strict=True)]
    fires = (k for k in range(len(levels)) if statistic[k] < 0.3 * max(statistic[: k + 1]))
    assert guard.report[0].transition_step == next(fires, None)


def test_models_without_training_steps_take_no_limit_in_steps() -> None:
    model = comfy.Model(comfy.Continuous(), comfy.dip)
    with pytest.raises(ValueError, match="deadline=600 counts training steps"):
        comfy.sample(comfy.guarded(policy("dtp"), model), comfy.euler, comfy.SIGMAS)
    comfy.sample(comfy.guarded(policy("paper-dtp"), model), comfy.euler, comfy.SIGMAS)


class Drawn(comfy.Model):
    """Conditional predictions drawn towards a picture, the more the less noise there is."""

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, conds: list[Any]) -> list[torch.Tensor]:
        u = x / (1 + sigma[0] ** 2) + 0.2 * self.directions[: len(x)]
        c = u + (self.pictures[: len(x)] - u) / (1 + sigma[0])
        return [{"positive": c, "negative": u}[cond[0]] for cond in conds]


@pytest.mark.parametrize("gate", [None, 0.002])
def test_anchored_is_what_the_loop_does(gate: float | None) -> None:
    """The same model under a compiled Euler schedule with ComfyUI's sigmas: x0 from x and epsilon there, shown outright here."""
    policies = [policy("anchored", gate=gate), policy("og+stp", gate=gate), policy("anchored", gate=1e3), policy("cfg")]
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(8)
    model, sigmas, batch = Drawn(comfy.Discrete(), comfy.dip), scheduler.sigmas.clone(), len(policies)
    patcher = comfy.guarded(Policy.stack(policies), model)
    (guard,) = patcher.model_options["sampler_post_cfg_function"]
    ours = comfy.sample(patcher, comfy.euler, sigmas, batch=batch, cfg=CFG)

    schedule = compile_schedule(scheduler)
    first = torch.randn(batch, *comfy.SHAPE, generator=torch.Generator().manual_seed(11)) * sigmas[0]
    loop = Loop(schedule, lower(policies, schedule, CFG, first[0].numel()), first)
    for sigma in sigmas[:-1]:
        c, u = model.predict(loop.x, sigma.expand(batch), [["positive"], ["negative"]])
        loop.advance((loop.x - u) / sigma, (loop.x - c) / sigma)
    torch.testing.assert_close(ours, loop.x, rtol=0, atol=2e-4)
    torch.testing.assert_close(guard._guide.loop.rules[:, Rule.ANCHORED :], loop.rules[:, Rule.ANCHORED :])
    assert guard.report[0].share_curve == pytest.approx(loop.shares[:8, 0].tolist(), rel=1e-3, abs=1e-4)
    assert (ours[0] - ours[3]).abs().max() > 0.1  # it did something
