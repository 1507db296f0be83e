"""Prompts disturbed at inference: Somepalli et al., NeurIPS 2023, "Understanding and mitigating copying in diffusion models".

What is drawn depends on the generator's seed, the prompt and the kind, so a call repeats itself; the generator itself is not touched
and gives stock's noise.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from bench.methods import loop
from bench.methods.base import Method, Request

COUNT = 4
LARGEST_NUMBER = 99_999
TOKENS = 49_400  # random tokens have a smaller id than this


class Words(Method):
    """Insert `count` words into the prompt, one after the other, each at a place drawn among all, both ends included.

    kind  "numbers": integers of 0 to 99,999; "words": a token of the vocabulary, id below 49,400, no special one, decoded;
          "repeat": a word of the original prompt

    details: `prompt`, as it was used.
    """

    def __init__(self, kind: str, *, count: int = COUNT, name: str | None = None) -> None:
        if kind not in ("numbers", "words", "repeat"):
            raise ValueError(f"kind={kind!r}: must be 'numbers', 'words' or 'repeat'")
        self.kind, self.count = kind, count
        self.name = name or {"repeat": "word-repeat"}.get(kind, f"random-{kind}")

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        seeds = [generator.initial_seed() for generator in request.generators]
        prompts = [self.disturb(p, s, pipe.tokenizer) for p, s in zip(request.prompts, seeds, strict=True)]
        return pipe(**{**request.arguments, "prompt": prompts}).images, [{"prompt": prompt} for prompt in prompts]

    def disturb(self, prompt: str, seed: int, tokenizer: Any) -> str:
        """The prompt with its insertions."""
        draws = _draws(self.kind, prompt, seed)
        original = prompt.split(" ")
        words = list(original)
        for _ in range(self.count):
            word = self._word(draws, original, tokenizer)
            words.insert(draws.randint(0, len(words)), word)
        return " ".join(words)

    def _word(self, draws: random.Random, original: list[str], tokenizer: Any) -> str:
        if self.kind == "numbers":
            return str(draws.randint(0, LARGEST_NUMBER))
        if self.kind == "repeat":
            return draws.choice(original)
        special = set(tokenizer.all_special_ids)
        return tokenizer.decode([draws.choice([i for i in range(min(TOKENS, len(tokenizer))) if i not in special])])


class EmbeddingNoise(Method):
    """u + strength * z_u and c + strength * z_c, z standard normal and independent.

    The authors' sd_mitigation.py adds noise to what _encode_prompt returns, in the diffusers of that time the unconditional and the
    conditional embeddings in one tensor.
    """

    def __init__(self, strength: float = 0.1, *, name: str = "embedding-noise") -> None:
        self.strength, self.name = strength, name
        self.on = ("u", "c")  # for settings.json: no mixing with earlier results, whose noise was on c alone

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        with torch.no_grad():
            u, c = loop.encode(pipe, request.prompts)
        noise = torch.stack(
            [
                self.noise(prompt, generator.initial_seed(), c[0].shape)
                for prompt, generator in zip(request.prompts, request.generators, strict=True)
            ]
        )
        u, c = (e + self.strength * z.to(e) for e, z in zip((u, c), noise.unbind(1), strict=True))
        arguments = {**request.arguments, "prompt": None, "prompt_embeds": c, "negative_prompt_embeds": u}
        return pipe(**arguments).images, [{} for _ in request.prompts]

    @staticmethod
    def noise(prompt: str, seed: int, shape: torch.Size) -> torch.Tensor:
        """z_u and z_c [2, *shape], float32 on the CPU."""
        generator = torch.Generator().manual_seed(_draws("embedding", prompt, seed).getrandbits(63))
        return torch.randn((2, *shape), generator=generator)


def _draws(kind: str, prompt: str, seed: int) -> random.Random:
    return random.Random(f"{kind} {seed} {prompt}")  # hashed by SHA-512: the same everywhere
