"""Han et al., the padding methods and the first look against small computations of their own, on the UNet alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bench.methods import FirstLook, HanBatch, HanSample, PaddingMask, PaddingSwap, Stock
from bench.methods import loop as stock_loop
from tests import pipelines

PROMPTS = ["a red apple", "a drawing of two small dogs"]
SHARE = math.sqrt(512 / 16384)  # of a published length: 8 x 8 x 8 elements here, 4 x 64 x 64 there


def close(a, b, by=1e-4):
    """Float32 through some steps of the model, as the project promises against stock."""
    torch.testing.assert_close(a, b, rtol=0, atol=by * b.abs().max().item())


@pytest.fixture
def parts(pipe):
    """Noise, u, c of the text encoder, the timesteps of five steps, and the UNet by itself."""
    with torch.no_grad():
        c, u = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    x = stock_loop.draw(pipe, [torch.Generator().manual_seed(seed) for seed in range(2)])
    pipe.scheduler.set_timesteps(5)

    def unet(x, t, embedding):
        return pipe.unet(x, t, encoder_hidden_states=embedding).sample

    return x, u, c, list(pipe.scheduler.timesteps), unet


def ddim(pipe, x, e, t):
    """One step of 200 training timesteps, written out."""
    kept = pipe.scheduler.alphas_cumprod
    now, before = kept[t], kept[t - 200] if t >= 200 else pipe.scheduler.final_alpha_cumprod
    return before.sqrt() * (x - (1 - now).sqrt() * e) / now.sqrt() + (1 - before).sqrt() * e


class TestHan:
    @torch.no_grad()
    def test_batch_wise_written_out(self, pipe, generate, parts):
        x, u, c, times, unet = parts
        for _ in range(2):
            delta = unet(x, times[0], c) - unet(x, times[0], u)
            hat = 50 * SHARE * delta / delta.square().sum((1, 2, 3), keepdim=True).sqrt()
            x = x - 0.7 * (unet(x + hat, times[0], c) - unet(x + hat, times[0], u) - delta)
        for k, t in enumerate(times):
            e = unet(x, t, u)
            if k >= 3:
                e = e + 7.5 * (unet(x, t, c) - e)
            x = ddim(pipe, x, e, int(t))
        made = generate(HanBatch(without=3), PROMPTS)
        close(made.latents, x)
        assert made.rows == 2 * (8 + 3 * 1 + 2 * 2)

    def test_published_rows(self, generate):
        assert generate(HanBatch(), PROMPTS, steps=50).rows == 2 * (2 * 50 + 8 - 5)

    def test_per_sample_is_adamw_on_each_image_alone(self, pipe, parts):
        x, u, c, times, unet = parts
        norms = (unet(x, times[0], c) - unet(x, times[0], u)).detach().double().square().sum((1, 2, 3)).sqrt()
        target = 0.97 * norms.min().item()  # both move, one for longer
        method = HanSample(target=target / SHARE, lr=0.02, iterations=40)
        got, details = method.optimise(x, look(pipe))
        for b in range(2):
            y, m, v = x[b : b + 1].clone(), 0.0, 0.0
            for k in range(40):
                y.requires_grad_(True)
                loss = (unet(y, times[0], c[b : b + 1]) - unet(y, times[0], u[b : b + 1])).square().sum().sqrt()
                if loss.item() <= target:
                    break
                (g,) = torch.autograd.grad(loss, [y])
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                step = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                y = (y * (1 - 0.02 * 0.01) - 0.02 * step).detach()
            assert details[b]["updates"] == k > 0
            assert details[b]["losses"][1] == pytest.approx(loss.item(), rel=1e-3)
            # lr * sign(g) where |g| is near a rounding of it: a few elements of 512 may go the other way at the first updates
            assert ((got[b] - y[0]).abs() < 2e-3).float().mean() > 0.98
        assert details[0]["updates"] != details[1]["updates"]

    def test_per_sample_rows(self, generate):
        made = generate(HanSample(target=0, iterations=3), PROMPTS)
        assert made.rows == 2 * (2 * 3 + 2 * 5) and [one["updates"] for one in made.details] == [3, 3]
        at_once = generate(HanSample(target=1e9), PROMPTS)
        assert at_once.rows == 2 * (2 + 2 * 5) and [one["updates"] for one in at_once.details] == [0, 0]
        close(at_once.latents, generate(Stock(), PROMPTS).latents)

    @pytest.mark.parametrize("method", [HanBatch(), HanSample(iterations=2)])
    def test_on_sdxl(self, method):
        pipe = pipelines.sdxl()
        made = method(
            pipe,
            ["a", "b"],
            [torch.Generator().manual_seed(s) for s in (0, 1)],
            num_inference_steps=6,
            guidance_scale=5.0,
        )
        assert made.latents.isfinite().all() and made.rows in (2 * (8 + 5 + 2), 2 * (4 + 12))


def look(pipe):
    from bench.methods.first_call import first_call

    noise = stock_loop.draw(pipe, [torch.Generator().manual_seed(seed) for seed in range(2)])
    arguments = {"prompt": PROMPTS, "num_inference_steps": 5, "guidance_scale": 7.5, "output_type": "latent"}
    return first_call(pipe, pipe.unet, arguments, noise)


class TestPadding:
    def test_swap(self, pipe, generate):
        """The tokenizer itself told to pad with "!": the prompt's embeddings, its end-of-text one zero; the empty prompt's likewise padded."""
        from transformers import CLIPTokenizer

        other = CLIPTokenizer.from_pretrained(pipe.tokenizer.name_or_path, pad_token="!")
        found = []
        for some in (PROMPTS, ["", ""]):
            ids = other(some, padding="max_length", max_length=16, return_tensors="pt").input_ids
            assert (ids[0] == other.convert_tokens_to_ids("!")).sum() > 5
            with torch.no_grad():
                found.append((pipe.text_encoder(ids)[0], (ids == 1279).int().argmax(1)))
        (c, ends), (u, _) = found
        c[[0, 1], ends] = 0
        want = plain(pipe, c, u)
        made = generate(PaddingSwap(), PROMPTS)
        close(made.latents, want)
        assert made.rows == 2 * 2 * 5 and (made.latents - generate(Stock(), PROMPTS).latents).abs().max() > 0.1

    @pytest.mark.parametrize("share", [0.7, 0.3])
    def test_mask(self, pipe, generate, share):
        with torch.no_grad():
            c, u = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
        ids = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
        for b in range(2):
            end = ids[b].tolist().index(1279)
            for place in range(end + 1, end + 1 + int((16 - end - 1) * share)):
                c[b, place] = 0
        assert (c == 0).all(-1).sum() > 2
        close(generate(PaddingMask(share), PROMPTS).latents, plain(pipe, c, u))

    def test_other_text_encoders_are_refused(self, pipe, monkeypatch):
        monkeypatch.setattr(pipe, "text_encoder", torch.nn.Linear(1, 1))
        with pytest.raises(TypeError, match="CLIPTextModel"):
            PaddingSwap().check(pipe)


def plain(pipe, c, u):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    arguments = {"num_inference_steps": 5, "guidance_scale": 7.5, "generator": generators, "output_type": "latent"}
    return pipe(prompt_embeds=c, negative_prompt_embeds=u, **arguments).images


class TestFirstLook:
    @torch.no_grad()
    def test_written_out(self, pipe, generate, parts):
        noise, u, c, times, unet = parts
        x, cs, d, update = noise, [], [], []
        for t in times:
            without, cond = unet(x, t, u), unet(x, t, c)
            cs.append(cond)
            d.append((cond - without).double().square().sum((1, 2, 3)))
            after = ddim(pipe, x, without + 7.5 * (cond - without), int(t))
            update.append((after - x).square().mean((1, 2, 3)).sqrt())
            x = after
        made = generate(FirstLook(), PROMPTS)
        change = [(b - a).square().mean((1, 2, 3)).sqrt() for a, b in itertools.pairwise(cs)]
        low = unet(noise, times[-3], u), unet(noise, times[-3], c)
        cosine = torch.nn.functional.cosine_similarity(low[0], low[1] - low[0], dim=1).mean((1, 2))
        for b, one in enumerate(made.details):
            assert one["d_curve"] == pytest.approx([float(v[b]) for v in d], rel=1e-3)
            assert one["update"] == pytest.approx([float(v[b]) for v in update], rel=1e-3)
            assert one["change"] == pytest.approx([float(v[b]) for v in change], rel=1e-3)
            assert one["norm"] == pytest.approx(float(d[0][b].sqrt() / SHARE), rel=1e-3)
            assert one["cosine"] == pytest.approx(float(cosine[b]), abs=1e-4)
            assert (one["elements"], one["timesteps"]) == (512, [float(t) for t in times])
        kept = pipe.scheduler.alphas_cumprod[times[0]]
        close(made.latents, (noise - (1 - kept).sqrt() * cs[0]) / kept.sqrt())
        assert made.rows == 2 * (2 * 5 + 2)

    def test_it_stops_after_five_rows(self, pipe, generate):
        assert generate(FirstLook(), PROMPTS, steps=50).rows == 2 * 12
        assert generate(Stock(), PROMPTS, steps=50).rows == 2 * 100, "the interrupt is that call's alone"
