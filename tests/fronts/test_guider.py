"""The guard as a diffusers guider: the contract of diffusers' own guiders, and the guidance of a loop with a compiled scheduler."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.guiders import guider_utils

from fastguard.kernels.layout import Row
from fastguard.loop.guide import Guide
from fastguard.loop.loop import Loop
from fastguard.policies.plan import lower
from fastguard.policies.policy import Policy
from fastguard.policies.presets import policy
from fastguard.schedules.compiler import compile_schedule

if not hasattr(guider_utils, "GuiderOutput"):
    pytest.skip("the guiders' contract is that of diffusers 0.36 and later", allow_module_level=True)
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState

from fastguard.fronts.guider import GuardedGuidance

SHAPE = (4, 8, 8)
STEPS = 10


def predictions(batch: int, rows: int, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(u, c) per row, the distance between them falls, rises and falls again, at another row for every image."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for k in range(rows):
        u, delta = torch.randn(2, batch, *SHAPE, generator=generator)
        size = torch.tensor([1.0 + abs(k - 3 - b % 3) for b in range(batch)]).view(-1, 1, 1, 1)
        found.append((u.to(dtype), (u + size * delta).to(dtype)))
    return found


def ask(guider: Any, u: torch.Tensor, c: torch.Tensor) -> Any:
    """What a modular denoising block does in one row, with a model that gives u and c."""
    states = guider.prepare_inputs({"prompt_embeds": (torch.ones(1), torch.zeros(1))})
    for state in states:
        guider.prepare_models(None)
        state.noise_pred = c if guider.is_conditional else u
        assert bool(state.prompt_embeds) == guider.is_conditional
        guider.cleanup_models(None)
    return guider(states)


def run(guider: Any, rows: list, timesteps: Any) -> list[torch.Tensor]:
    guided = []
    for k, (u, c) in enumerate(rows):
        guider.set_state(step=k, num_inference_steps=len(rows), timestep=timesteps[k])
        guided.append(ask(guider, u, c)[0])
    return guided


def scheduler_of(kind: Any = DDIMScheduler) -> Any:
    scheduler = kind()
    scheduler.set_timesteps(STEPS)
    return scheduler


POLICIES = [
    policy("cfg"),
    policy("stp"),
    policy("og+stp"),
    policy("dtp"),
    policy("paper-og+dtp"),
    policy("dtp", gate=4.5),
    policy("dtp", gate=2.0, guidance_scale=3.0),
]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, partial(PNDMScheduler, skip_prk_steps=True)])
def test_it_decides_as_a_guide_with_the_compiled_scheduler(kind: Any) -> None:
    scheduler = scheduler_of(kind)
    times = scheduler.timesteps
    rows = predictions(len(POLICIES), len(times))
    guider = GuardedGuidance(Policy.stack(POLICIES), guidance_scale=6.0)
    guided = run(guider, rows, times)
    guide = Guide(POLICIES, compile_schedule(scheduler), guidance_scale=6.0, latents=rows[0][0])
    for e, (u, c) in zip(guided, rows, strict=True):
        stock = ClassifierFreeGuidance(6.0).forward(c, u).pred
        assert torch.equal(e, guide(u, c, combined=stock))
    expected = [image.to_dict() for image in guide.report()]
    for image in expected:
        image.update(path="guider")
    assert [image.to_dict() for image in guider.report] == expected
    assert {image["transition_step"] for image in expected} > {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}, {"use_original_formulation": True}, {"stop": 0.5}])
def test_unguarded_images_keep_the_bits_of_stock(options: dict, dtype: torch.dtype) -> None:
    times = scheduler_of().timesteps
    rows = predictions(2, STEPS, dtype)
    stock = run(ClassifierFreeGuidance(4.0, **options), rows, times)
    mixed = Policy.stack([policy("cfg"), policy("dtp", gate=100.0)])
    assert all(map(torch.equal, run(GuardedGuidance("cfg", 4.0, **options), rows, times), stock))
    assert all(map(torch.equal, run(GuardedGuidance(mixed, 4.0, **options), rows, times), stock))


def test_opposite_in_the_original_formulation_has_the_scale_that_the_output_has() -> None:
    (u, c), *_ = predictions(1, 1)
    guider = GuardedGuidance("og+dtp", 4.0, use_original_formulation=True)
    (e,) = run(guider, [(u, c)], [torch.tensor(999)])
    torch.testing.assert_close(e, u - 5.0 * (c - u))  # c + 4 (c - u) = u + 5 (c - u)


def test_outside_of_start_and_stop_the_guard_holds_and_the_others_get_stocks_output() -> None:
    rows, times = predictions(2, STEPS), scheduler_of().timesteps
    guided = run(
        GuardedGuidance(Policy.stack([policy("stp", t_star=300), policy("cfg")]), 4.0, start=0.3, stop=0.5), rows, times
    )
    stock = run(ClassifierFreeGuidance(4.0, start=0.3, stop=0.5), rows, times)
    for k, (u, _) in enumerate(rows):
        assert torch.equal(guided[k][0], u[0] if times[k] > 300 else stock[k][0])
        assert torch.equal(guided[k][1], stock[k][1])


def test_both_branches_run_where_the_guard_needs_them() -> None:
    guarded, plain = GuardedGuidance("dtp", 4.0, start=0.5), GuardedGuidance("cfg", 4.0, start=0.5)
    for guider in (guarded, plain):
        guider.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(999))
    assert (guarded.num_conditions, plain.num_conditions) == (2, 1)
    assert (GuardedGuidance("dtp", 1.0).num_conditions, GuardedGuidance("cfg", 1.0).num_conditions) == (2, 1)
    guarded.disable()
    assert guarded.num_conditions == 1
    (u, c), *_ = predictions(1, 1)
    assert torch.equal(ask(guarded, u, c)[0], c) and guarded.report is None
    guarded.enable()
    with pytest.raises(ValueError, match="pred_uncond is None: policy 'dtp' needs both"):
        guarded.forward(c)


def test_a_run_begins_at_step_0_whatever_its_batch() -> None:
    times = scheduler_of().timesteps
    guider = GuardedGuidance("dtp", 4.0)
    first = run(guider, predictions(3, STEPS), times)
    curve = guider.report[0].d_curve
    run(guider, predictions(2, STEPS)[:4], times)  # interrupted
    assert len(guider.report) == 2 and len(guider.report[0].d_curve) == 4
    assert all(map(torch.equal, run(guider, predictions(3, STEPS), times), first))
    assert guider.report[0].d_curve == curve


def test_another_scale_between_two_rows_keeps_the_decisions() -> None:
    rows, times = predictions(1, STEPS), scheduler_of().timesteps
    guider = GuardedGuidance("paper-og+dtp", 4.0)
    for k, (u, c) in enumerate(rows):
        guider.guidance_scale = 4.0 if k < 2 else 6.0
        guider.set_state(step=k, num_inference_steps=STEPS, timestep=times[k])
        e = ask(guider, u, c)[0]
        g = guider.guidance_scale if k >= 4 else -guider.guidance_scale
        torch.testing.assert_close(e, u + g * (c - u), rtol=1e-5, atol=1e-4)
    assert guider.report[0].transition_step == 4


@pytest.mark.parametrize("source", ["stp", "file", "dict", "object"])
def test_the_config_is_saved_and_loaded(source: str, tmp_path: Any) -> None:
    chosen = policy("stp", gate=[0.02, None])
    given = {"stp": "stp", "file": chosen.save(tmp_path / "p.json"), "dict": chosen.to_dict(), "object": chosen}[source]
    guider = GuardedGuidance(given, guidance_scale=3.0, stop=0.8)
    guider.save_pretrained(tmp_path)
    loaded = GuardedGuidance.from_pretrained(tmp_path)
    assert loaded.policy == guider.policy == (policy("stp") if source == "stp" else chosen)
    assert (loaded.guidance_scale, loaded._stop) == (3.0, 0.8)
    assert loaded.config.policy == guider.policy.to_dict()
    assert loaded.new(guidance_scale=5.0).policy == guider.policy
    assert "policy" in repr(loaded)


def test_inputs_from_a_block_state() -> None:
    guider = GuardedGuidance("dtp")
    state = BlockState(positive=torch.ones(1), negative=torch.zeros(1), shared=torch.full((1,), 2.0))
    both = guider.prepare_inputs_from_block_state(state, {"embeds": ("positive", "negative"), "other": "shared"})
    assert [float(one.embeds) for one in both] == [1.0, 0.0] and [float(one.other) for one in both] == [2.0, 2.0]


def test_without_set_state_only_policies_without_a_timestep_run() -> None:
    rows = predictions(1, 6)
    guider = GuardedGuidance("paper-dtp", 4.0)
    guided = [guider.forward(c, u).pred for u, c in rows]
    assert [torch.equal(e, u) for e, (u, _) in zip(guided, rows, strict=True)] == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="'dtp' ends at timestep 600: call set_state"):
        GuardedGuidance("dtp").forward(rows[0][1], rows[0][0])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="policy='nope'"):
        GuardedGuidance("nope")
    (u, c), *_ = predictions(1, 1)
    for chosen, why in ((policy("dtp", magnitude="x0"), "has magnitude='x0'"), ("anchored", "is anchored")):
        with pytest.raises(ValueError, match=f"{why}, which needs noise levels: set guider.scheduler"):
            GuardedGuidance(chosen).forward(c, u)
    with pytest.raises(ValueError, match="has 2 values: must be one number"):
        GuardedGuidance(policy("paper-dtp", guidance_scale=(1.0, 2.0))).forward(c, u)
    with pytest.raises(ValueError, match="lists of 3 values, but the batch has 1"):
        GuardedGuidance(policy("stp", gate=[0.1, 0.2, 0.3])).forward(c, u)


class Shown(torch.nn.Module):
    """A denoiser whose two predictions are functions of what it is shown: more channels than it predicts, as an inpainting model's."""

    def forward(self, hidden_states: torch.Tensor, negative: bool) -> torch.Tensor:
        x = hidden_states[:, : SHAPE[0]]
        picture = torch.linspace(-1, 1, x[0].numel()).view(1, *SHAPE)
        return 0.6 * x + (0.1 * x.roll(1, -1) if negative else 0.5 * picture)


ANCHORED = [policy("anchored"), policy("anchored", gate=0.3), policy("og+stp", gate=1e3), policy("cfg")]


@pytest.mark.parametrize("kind", [partial(DDIMScheduler, clip_sample=False), EulerDiscreteScheduler])
def test_anchored_policies_do_what_the_loop_does(kind: Any) -> None:
    """Given the scheduler, and shown the latents by `prepare_models`."""
    scheduler, model, batch = scheduler_of(kind), Shown(), len(ANCHORED)
    schedule = compile_schedule(scheduler)
    first = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(2)) * float(scheduler.init_noise_sigma)
    loop = Loop(schedule, lower(ANCHORED, schedule, 5.0, first[0].numel()), first)
    for row in schedule.rows[:-1]:
        loop.advance(*(model(loop.x * float(row[Row.S]), negative) for negative in (True, False)))

    guider, x = GuardedGuidance(Policy.stack(ANCHORED), 5.0), first
    guider.scheduler = scheduler
    for k, t in enumerate(scheduler.timesteps):
        guider.set_state(step=k, num_inference_steps=STEPS, timestep=t)
        states = guider.prepare_inputs({"negative": (False, True)})
        for state in states:
            guider.prepare_models(model)
            shown = torch.cat([scheduler.scale_model_input(x, t), torch.ones(batch, 1, *SHAPE[1:])], 1)
            state.noise_pred = model(hidden_states=shown, negative=state.negative)
            guider.cleanup_models(model)
        x = scheduler.step(guider(states)[0], t, x).prev_sample
    torch.testing.assert_close(x, loop.x, rtol=0, atol=2e-5 * float(loop.x.abs().max()))
    assert not model._forward_pre_hooks
    assert guider.report[0].share_curve == pytest.approx(loop.shares[:STEPS, 0].tolist(), rel=1e-3, abs=1e-4)
    assert guider.report[0].transition_step is None and guider.report[3].share_curve[0] is None

    guider.set_state(step=0, num_inference_steps=STEPS, timestep=scheduler.timesteps[0])
    guider._shown = None
    with pytest.raises(RuntimeError, match="must call the guider's prepare_models"):
        guider.forward(x, x + 1)
