"""The guidance interval and the authors' loops against stock, against fastguard, and against DDIM written out."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch
from scipy.signal import argrelextrema

from bench.methods import Dynamic, Interval, Opposite, Preset, Static, Stock, methods
from bench.methods import loop as stock_loop
from bench.methods.interval import sigma
from bench.methods.reference import transition_step
from fastguard import testbed
from tests import pipelines

PROMPTS = ["a red apple", "two dogs"]
WORDS = ["a red apple", "two dogs", "abc def", "zebra 12", "hello world", "q"]
MEMORIZED = [prompt.prompt for prompt in testbed.prompts("memorized")[::20]]


def close(a, b):
    """Float32 through some steps of the model: 1e-4 of the largest value, as the project promises against stock."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


class TestInterval:
    def test_all_levels_are_plain_guidance(self, generate):
        made = generate(Interval(0, 1e9), PROMPTS)
        close(made.latents, generate(Stock(), PROMPTS).latents)
        assert made.rows == 2 * 2 * 5

    def test_no_level_is_the_conditional_branch_alone(self, pipe, generate):
        made = generate(Interval(1e8, 1e9), PROMPTS)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        want = pipe(PROMPTS, num_inference_steps=5, guidance_scale=1.0, generator=generators, output_type="latent")
        close(made.latents, want.images)
        assert made.rows == 2 * 5

    def test_stock_until_its_end_and_conditional_after_it(self, pipe, generate):
        """Against diffusers' own recipe for a guidance that ends, a callback."""

        def end(pipe, k, t, tensors):
            if k == 2:
                pipe._guidance_scale = 1.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
            return tensors

        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        want = pipe(
            PROMPTS,
            num_inference_steps=8,
            guidance_scale=7.5,
            generator=generators,
            output_type="latent",
            callback_on_step_end=end,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        ).images
        between = [sigma(pipe.scheduler, float(t)) for t in pipe.scheduler.timesteps[2:4]]
        made = generate(Interval(sum(between) / 2, 1e9), PROMPTS, steps=8)
        close(made.latents, want)
        assert made.details[0]["guided"] == [True] * 3 + [False] * 5
        assert made.rows == 2 * (2 * 3 + 5)

    def test_open_below_and_closed_above(self, pipe, generate):
        pipe.scheduler.set_timesteps(5)
        levels = [sigma(pipe.scheduler, float(t)) for t in pipe.scheduler.timesteps]
        made = generate(Interval(levels[3], levels[1]), PROMPTS)
        assert made.details[1]["guided"] == [False, True, True, False, False]
        assert made.rows == 2 * (2 * 2 + 3)

    def test_sigma_is_the_one_of_diffusers_sigma_schedules(self, pipe):
        for spacing in ("leading", "linspace"):
            euler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
            euler.set_timesteps(30)
            ours = [sigma(pipe.scheduler, float(t)) for t in euler.timesteps]
            # Euler interpolates sigma, we its logarithm: between two of 1000 levels that is 1e-4.
            np.testing.assert_allclose(ours, euler.sigmas[:-1].numpy(), rtol=1e-4 if spacing == "leading" else 1e-3)

    def test_bounds_are_checked(self):
        with pytest.raises(ValueError, match="low"):
            Interval(2, 1)


@pytest.fixture(scope="module")
def wavy():
    """A random model whose d rises and falls: its embedding of time turns ten times as fast, so minima come at all sorts of steps."""
    pipe = pipelines.sd()
    with torch.no_grad():
        pipe.unet.time_embedding.linear_1.weight.mul_(10)
    return pipe


def call(pipe, method, prompts, first=0, steps=20):
    generators = [torch.Generator().manual_seed(first + place) for place in range(len(prompts))]
    return method(pipe, prompts, generators, num_inference_steps=steps, guidance_scale=7.5)


class TestReferenceDecisions:
    """The guard's decisions, in a batch, are those of the authors' loop on single images; nothing is forced on either."""

    RULES = [
        (1.0, "released-dtp"),
        (0.0, "paper-dtp"),
        ("opposite", "paper-og+dtp"),
        (0.0, "dtp"),
        ("opposite", "og+dtp"),
    ]

    @pytest.mark.parametrize("before,preset", RULES)
    def test_dynamic_on_a_random_model(self, wavy, before, preset):
        theirs, ours = (call(wavy, method, WORDS) for method in (Dynamic(before), Preset(preset)))
        decided = same_decisions(theirs, ours, Preset(preset).policy.deadline)
        assert sum(decided) >= 5, "the comparison must be of something"
        fired = [one["transition_step"] for one in theirs.details]
        assert len({k for k in fired if k is not None}) >= 2 and None in fired
        assert theirs.rows == ours.rows

    @pytest.mark.parametrize("before,preset", RULES)
    def test_dynamic_on_the_embedded_model(self, pipe, before, preset):
        prompts = [*MEMORIZED, *PROMPTS]
        theirs, ours = (call(pipe, method, prompts) for method in (Dynamic(before), Preset(preset)))
        assert sum(same_decisions(theirs, ours, Preset(preset).policy.deadline)) >= len(prompts) / 2
        assert theirs.rows == ours.rows

    @pytest.mark.parametrize("t_star,before,preset", [(500, 0.0, "stp"), (650, -2.0, "og+stp")])
    def test_static(self, generate, t_star, before, preset):
        theirs = generate(Static(t_star, before), PROMPTS, steps=12)
        ours = generate(Preset(preset, monitor=True), PROMPTS, steps=12)
        assert all(same_decisions(theirs, ours))
        assert theirs.details[0]["transition_step"] not in (None, 0)


def same_decisions(theirs, ours, deadline=None):
    """Asserts what the authors' loop and the guard share, image by image; returns which decisions could be compared.

    With a deadline the guard switches there if the loop has not by then. Where two successive d up to the transition differ by less
    than 1e-4, rounding decides and nothing is asserted of the decision.
    """
    compared = []
    for k, (a, b) in enumerate(zip(theirs.details, ours.details, strict=True)):
        want, forced = a["transition_step"], False
        if deadline is not None:
            late = next(k for k, t in enumerate(a["timesteps"]) if t <= deadline)
            want, forced = (want, False) if want is not None and want <= late else (late, True)
        steps = [step for step in (a["transition_step"], b["transition_step"]) if step is not None]
        together = slice(min(steps, default=len(a["d_curve"])) + 1)
        d = np.array(a["d_curve"][together])
        np.testing.assert_allclose(b["d_curve"][together], d, rtol=1e-3)
        compared.append(bool((abs(np.diff(d)) > 1e-4 * d[1:]).all()))
        if compared[-1]:
            assert (b["transition_step"], bool(b["forced"])) == (want, forced)
            if want == a["transition_step"]:
                close(theirs.latents[k], ours.latents[k])
    return compared


def ddim(pipe, x, times, stride, g, embeddings):
    """DDIM written out: x and then every later x, under e = u + g (c - u); `stride` leads to the previous timestep."""
    kept, final, xs = pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod, [x]
    for t in times:
        with torch.no_grad():
            u, c = (pipe.unet(x, t, encoder_hidden_states=embedding).sample for embedding in embeddings)
        e = u + g * (c - u)
        now, before = kept[t], kept[t - stride] if t >= stride else final
        x = before.sqrt() * (x - (1 - now).sqrt() * e) / now.sqrt() + (1 - before).sqrt() * e
        xs.append(x)
    return xs


class TestOpposite:
    def test_transition_step(self):
        assert transition_step([3, 2, 1, 0]) == 5
        assert transition_step([3, 2, 3, 0]) == 1
        assert transition_step([3, 2, 3, 0, 1]) == 3
        assert transition_step([3, 2, 1, 2, 0, 1]) == 2
        assert transition_step([3, 1, 1, 2, 2]) == 5, "strict on both sides"
        for seed in range(50):
            curve = np.random.default_rng(seed).random(12)
            minima = argrelextrema(curve, np.less)[0].tolist()
            assert transition_step(curve.tolist()) == (minima[1] if minima[0] == 1 and minima[1:] else minima[0])

    def test_both_passes_written_out(self, pipe, generate):
        steps = 10
        made = generate(Opposite(), PROMPTS[:1], steps=steps)
        detail = made.details[0]
        c, u = (embedding.detach() for embedding in pipe.encode_prompt(PROMPTS[:1], "cpu", 1, True))
        x = stock_loop.draw(pipe, [torch.Generator().manual_seed(0)])
        coarse = [1 + 100 * k for k in reversed(range(steps))]
        probe = ddim(pipe, x, coarse, 100, -7.5, (u, c))
        cosine = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in itertools.pairwise(probe)]
        np.testing.assert_allclose(detail["probe_curve"], 1 - torch.stack(cosine).numpy(), rtol=1e-2, atol=1e-5)

        k = detail["transition_step"]
        fine = [t for t in (1 + 25 * j for j in reversed(range(4 * steps))) if t <= coarse[k]]
        assert detail["timesteps"] == [*coarse[:k], *fine]
        want = ddim(pipe, probe[k], fine, 25, 7.5, (u, c))[-1]
        close(made.latents, want)
        assert made.rows == 2 * (steps + k + len(fine))

    def test_rows_by_transition(self, wavy, monkeypatch):
        """N steps, k its transition: the script takes 2 (N + k + 4 (N - k) - 3) rows of the denoiser, og+dtp 2 N.

        So og+dtp takes at most a quarter if and only if 3 (k + 1) <= N, k <= 15 of 50; and it always takes less than half, since a
        minimum is not at the last step.
        """
        monkeypatch.setattr(wavy.unet, "forward", lambda x, *_, **__: (torch.zeros_like(x),))  # only counted
        for k in (1, 15, 16, 48):
            monkeypatch.setattr("bench.methods.reference.transition_step", lambda curve, k=k: k)
            theirs, ours = (
                call(wavy, methods()[name](), WORDS[:1], steps=50) for name in ("reference-og+dtp", "og+dtp")
            )
            assert theirs.rows == 2 * (50 + k + 4 * (50 - k) - 3) and ours.rows == 2 * 50
            assert (ours.rows <= 0.25 * theirs.rows) is (3 * (k + 1) <= 50)
            assert ours.rows < 0.5 * theirs.rows

    def test_rows_on_the_embedded_model(self, pipe):
        """Transitions as the probe finds them; which they are depends on the weights."""
        prompts = [MEMORIZED[0], MEMORIZED[-1], PROMPTS[0]]
        theirs, ours = (call(pipe, methods()[name](), prompts, steps=50) for name in ("reference-og+dtp", "og+dtp"))
        found = [one["transition_step"] for one in theirs.details]
        assert all(found[i] == transition_step(one["probe_curve"]) for i, one in enumerate(theirs.details))
        assert theirs.rows == sum(2 * (50 + k + 4 * (50 - k) - 3) for k in found)
        assert ours.rows == 2 * 50 * len(prompts)
        assert 0.2 < ours.rows / theirs.rows < 0.5

    def test_schedulers_that_cannot_be_set_anew(self, pipe, monkeypatch):
        monkeypatch.setattr(pipe, "scheduler", diffusers.PNDMScheduler.from_config(pipe.scheduler.config))
        with pytest.raises(TypeError, match="PNDMScheduler"):
            Opposite()(pipe, ["a"], [torch.Generator()], num_inference_steps=5, guidance_scale=7.5)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_own_loop_is_stocks_for_other_schedulers(pipe, generate, monkeypatch, kind):
    """Scaled inputs, multistep history, noise drawn in the steps: guidance on all levels is stock."""
    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, kind).from_config(pipe.scheduler.config))
    want = generate(Stock(), PROMPTS).latents
    close(generate(Interval(0, 1e9), PROMPTS).latents, want)
    close(generate(Static(2000, 0.0), PROMPTS).latents, want)
