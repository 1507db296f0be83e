"""Wen et al., Ren et al. and Somepalli et al. against small computations of their own."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch

from bench.methods import EmbeddingNoise, Ren, Stock, Wen, Words
from bench.methods import loop as stock_loop

PROMPTS = ["a red apple", "a drawing of two small dogs"]


def seeded(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def start(pipe, prompts, steps=5):
    """x, u, c and t of the first step, by the pipeline's own methods."""
    c, u = pipe.encode_prompt(prompts, "cpu", 1, True)
    pipe.scheduler.set_timesteps(steps)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    channels = pipe.unet.config.in_channels
    x = pipe.prepare_latents(len(prompts), channels, side, side, torch.float32, "cpu", seeded(len(prompts)))
    return x, u.detach(), c.detach(), pipe.scheduler.timesteps[0]


def test_draw_is_stocks_noise(pipe):
    x, *_ = start(pipe, PROMPTS)
    assert torch.equal(stock_loop.draw(pipe, seeded(2)), x)  # DDIM: init_noise_sigma = 1


class TestWen:
    def test_loss_is_one_norm_over_all_images_of_the_prompt(self, pipe, generate):
        prompts = [PROMPTS[0]] * 2
        x, u, c, t = start(pipe, prompts)
        with torch.no_grad():
            outputs = [pipe.unet(x, t, encoder_hidden_states=embedding).sample for embedding in (c, u)]
        want = (outputs[0] - outputs[1]).double().square().sum().sqrt().item()
        for detail in generate(Wen(None, iterations=1), prompts).details:
            assert detail["losses"] == pytest.approx([want], rel=1e-5)

    def test_one_update_is_adamw_with_a_still_first_token(self, pipe):
        x, u, c, t = start(pipe, [PROMPTS[0]] * 2)
        got, _, updates = Wen(None, iterations=1).optimise(pipe, x, u, c[:1])

        e = c[:1].clone().requires_grad_(True)
        predicted = pipe.unet(x, t, encoder_hidden_states=e.repeat(2, 1, 1)).sample
        plain = pipe.unet(x, t, encoder_hidden_states=u).sample.detach()
        (predicted - plain).square().sum().sqrt().backward()
        g = e.grad.clone()
        pipe.unet.zero_grad()
        assert g[:, 0].abs().max() > 0, "the first token would move if it were let"
        # AdamW's first step: m / (1 - beta1) = g, v / (1 - beta2) = g^2; decay 0.01, eps 1e-8.
        want = c[:1] * (1 - 0.05 * 0.01)
        want[:, 1:] -= 0.05 * g[:, 1:] / (g[:, 1:].abs() + 1e-8)
        assert updates == 1
        assert torch.equal(got[:, 0], want[:, 0])
        # The step is lr * sign(g) but where |g| is near eps, where a rounding of g shows.
        clear = g[:, 1:].abs() > 1e-4 * g.abs().max()
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(got[:, 1:][clear], want[:, 1:][clear], rtol=0, atol=1e-4)

    def test_reaching_the_target_ends_it_before_the_update(self, pipe, generate):
        free = generate(Wen(None, iterations=4), PROMPTS[:1]).details[0]
        assert free["updates"] == 4 and min(free["losses"][1:]) < free["losses"][0]
        at_once = generate(Wen(free["losses"][0] * 1.01), PROMPTS[:1])
        assert at_once.details[0]["updates"] == 0 and len(at_once.details[0]["losses"]) == 1
        assert torch.equal(at_once.latents, generate(Stock(), PROMPTS[:1]).latents)
        lowest = min(range(4), key=free["losses"].__getitem__)
        later = generate(Wen(free["losses"][lowest] * 1.0001), PROMPTS[:1])
        assert later.details[0]["updates"] == lowest > 0
        assert torch.equal(later.latents, generate(Wen(None, iterations=lowest), PROMPTS[:1]).latents)
        assert not torch.equal(later.latents, at_once.latents)
        assert later.rows == 2 * (lowest + 1) + 2 * 5

    def test_prompts_do_not_mix(self, generate):
        mixed = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
        both = generate(Wen(None, iterations=2), mixed, seeds=[0, 1, 2])
        pair = generate(Wen(None, iterations=2), [PROMPTS[0]] * 2, seeds=[0, 2])
        alone = generate(Wen(None, iterations=2), PROMPTS[1:], seeds=[1])
        assert both.details == [pair.details[0], alone.details[0], pair.details[1]]
        want = torch.stack([pair.latents[0], alone.latents[0], pair.latents[1]])
        torch.testing.assert_close(both.latents, want, rtol=0, atol=1e-4 * want.abs().max().item())

    def test_the_model_is_left_without_gradients(self, pipe, generate):
        generate(Wen(None, iterations=1), PROMPTS)
        assert all(parameter.grad is None for parameter in pipe.unet.parameters())


class TestRen:
    C1 = 1.25

    def test_every_cross_attention_by_hand(self, pipe, generate):
        seen = []
        layers = [block.attn2 for block in pipe.unet.modules() if hasattr(block, "attn2")]
        hooks = [
            layer.register_forward_hook(
                lambda layer, args, kwargs, out: seen.append((layer, args[0], kwargs["encoder_hidden_states"], out)),
                with_kwargs=True,
            )
            for layer in layers
        ]
        generate(Ren(self.C1), PROMPTS, steps=1)
        for hook in hooks:
            hook.remove()
        assert len(seen) == len(layers) > 0
        lengths = [len(pipe.tokenizer(prompt).input_ids) for prompt in PROMPTS]
        assert lengths[0] != lengths[1]
        for layer, hidden, text, out in seen:
            for row in range(4):
                want = by_hand(layer, hidden[row], text[row], lengths[row % 2], self.C1 if row >= 2 else 1.0)
                torch.testing.assert_close(out[row], want, rtol=0, atol=1e-5 * want.abs().max().item())

    def test_a_batch_is_its_images_one_by_one(self, generate):
        both = generate(Ren(), PROMPTS).latents
        alone = [generate(Ren(), [prompt], seeds=[seed]).latents for seed, prompt in enumerate(PROMPTS)]
        torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-4 * both.abs().max().item())

    def test_nothing_stays_behind(self, pipe, generate):
        before = generate(Stock(), PROMPTS).latents
        assert not torch.equal(generate(Ren(), PROMPTS).latents, before)
        assert torch.equal(generate(Stock(), PROMPTS).latents, before)


def by_hand(layer, hidden, text, length, c1):
    """One image's cross-attention, [pixels, features] on [tokens, features], in float64."""

    def heads(linear, values):
        made = values.double() @ linear.weight.double().T
        return made.unflatten(-1, (layer.heads, -1))

    q, k, v = heads(layer.to_q, hidden), heads(layer.to_k, text), heads(layer.to_v, text)
    logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    logits[:, :, 0] *= c1
    logits[:, :, length:] = -torch.inf
    mixed = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v).flatten(1)
    out = layer.to_out[0]
    return (mixed @ out.weight.double().T + out.bias.double()).float()


class TestWords:
    @pytest.mark.parametrize("kind", ["numbers", "words", "repeat"])
    def test_the_prompt_is_what_stock_gets(self, pipe, generate, kind):
        made = generate(Words(kind), PROMPTS)
        used = [detail["prompt"] for detail in made.details]
        assert used != PROMPTS
        assert torch.equal(made.latents, generate(Stock(), used).latents)

    def test_numbers(self, pipe):
        drawn, places = [], collections.Counter()
        for seed in range(500):
            words = Words("numbers").disturb("a red apple", seed, pipe.tokenizer).split(" ")
            numbers = [word for word in words if word.isdigit()]
            assert len(words) == 7 and len(numbers) == 4
            assert [word for word in words if not word.isdigit()] == ["a", "red", "apple"]
            drawn += map(int, numbers)
            places[tuple(word.isdigit() for word in words)] += 1
        assert 0 <= min(drawn) < 500 and 99_500 < max(drawn) <= 99_999
        assert len(places) > 30, "35 arrangements of 4 among 3"
        assert abs(sum(drawn) / len(drawn) - 49_999.5) < 5 * 28_868 / len(drawn) ** 0.5

    def test_words(self, pipe):
        tokenizer, drawn = pipe.tokenizer, set()
        vocabulary = {tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}
        for seed in range(100):
            words = Words("words").disturb("|", seed, tokenizer).split(" ")
            assert len(words) == 5 and words.count("|") >= 1
            drawn.update(word for word in words if word != "|")
        assert drawn <= vocabulary and len(drawn) > 250

    def test_words_below_the_limit(self, monkeypatch, pipe):
        monkeypatch.setattr("bench.methods.somepalli.TOKENS", 3)
        allowed = {pipe.tokenizer.decode([i]) for i in range(3)}
        used = {w for s in range(30) for w in Words("words").disturb("apple", s, pipe.tokenizer).split(" ")}
        assert used - {"apple"} == allowed

    def test_repeat(self, pipe):
        chosen = collections.Counter()
        for seed in range(300):
            words = collections.Counter(Words("repeat").disturb("a red apple", seed, None).split(" "))
            words.subtract(["a", "red", "apple"])
            assert sum(words.values()) == 4 and set(words) == {"a", "red", "apple"} and min(words.values()) >= 0
            chosen.update(words)
        assert all(abs(count - 400) < 5 * (1200 * 2 / 9) ** 0.5 for count in chosen.values())

    def test_seed_and_prompt_decide(self):
        words = Words("numbers").disturb
        assert words("a b", 1, None) == words("a b", 1, None)
        assert words("a b", 1, None) != words("a b", 2, None)
        draws = [[w for w in words(p, 1, None).split(" ") if w.isdigit()] for p in ("a b", "a c")]
        assert draws[0] != draws[1]
        with pytest.raises(ValueError, match="kind"):
            Words("letters")


class TestEmbeddingNoise:
    def test_both_embeddings_plus_a_tenth_of_noise(self, pipe, generate):
        seen = []
        hook = pipe.unet.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        made = generate(EmbeddingNoise(), PROMPTS)
        hook.remove()
        _, u, c, _ = start(pipe, PROMPTS)
        assert all(torch.equal(s, seen[0]) for s in seen)
        z = (seen[0] - torch.cat([u, c])) / 0.1
        count = z[0].numel()
        for one in z:  # five standard errors
            assert abs(one.mean()) < 5 / count**0.5 and abs(one.std() - 1) < 5 / (2 * count) ** 0.5
        for a, b in itertools.combinations(z, 2):
            assert abs((a * b).mean()) < 5 / count**0.5
        assert not torch.equal(made.latents, generate(Stock(), PROMPTS).latents)
        # Not the noise of the latents again.
        latents = stock_loop.draw(pipe, seeded(1)).flatten()
        for one in (z[0], z[2]):
            assert not torch.allclose(one.flatten()[: len(latents)], latents, atol=1e-3)

    def test_no_noise_is_stock(self, generate):
        assert torch.equal(generate(EmbeddingNoise(0.0), PROMPTS).latents, generate(Stock(), PROMPTS).latents)
