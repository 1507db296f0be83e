"""Prompt embeddings optimised before the first step: Wen et al., ICLR 2024, "Detecting, explaining, and mitigating memorization"."""

from __future__ import annotations

from typing import Any

import torch

from bench.methods import loop
from bench.methods.base import Method, Request


class Wen(Method):
    """Move the conditional embedding until the first step's guidance is small, then generate from it as stock does.

    loss = ||c - u||_2 = sqrt(sum of (c - u)^2), one norm over all images of a prompt, at the first timestep and the initial noise

    Images of one call with the same prompt share one embedding, so put a prompt's seeds into one call. AdamW with torch's defaults
    (its weight decay reaches the first token too); the gradient of the first token, BOS, is zero. A loss at or below the target ends
    it before the update.

    target      of the loss; None: all iterations. Published: 1 to 7 for latents of 4 x 64 x 64; the norm grows as the square root of
                the number of elements, so 3 there is 0.53 for the embedded model's 8 x 8 x 8. Being over all
                images of a prompt it grows with their number too: 3 with four seeds asks of each what 1.5 asks of one
    lr          of AdamW
    iterations  at most this many updates

    Costs two rows an image for each evaluation of the loss, and a backward pass for each update, which `rows` does not count.
    details: `losses` before each update and the one that ended it, `updates`.
    """

    def __init__(
        self, target: float | None = 3.0, *, lr: float = 0.05, iterations: int = 10, name: str | None = None
    ) -> None:
        if (target is not None and target < 0) or lr <= 0 or iterations < 0:
            raise ValueError(f"target={target!r}, lr={lr!r}, iterations={iterations!r}: must be >= 0, > 0, >= 0")
        self.target, self.lr, self.iterations = target, lr, iterations
        self.name = name or f"wen-{'all' if target is None else format(target, 'g')}"

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        with torch.no_grad():
            u, c = loop.encode(pipe, request.prompts)
            noise = loop.draw(pipe, request.generators)
            x = loop.begin(pipe, noise, request.steps)
        details: list[dict[str, Any]] = [{} for _ in request.prompts]
        for prompt in dict.fromkeys(request.prompts):
            mine = [b for b, other in enumerate(request.prompts) if other == prompt]
            embedding, losses, updates = self.optimise(pipe, x[mine], u[mine], c[mine[:1]])
            c[mine] = embedding.to(c.dtype)
            for b in mine:
                details[b] = {"losses": list(losses), "updates": updates}
        arguments = {**request.arguments, "prompt": None, "prompt_embeds": c, "negative_prompt_embeds": u}
        return pipe(**arguments, latents=noise).images, details

    @torch.enable_grad()
    def optimise(
        self, pipe: Any, x: torch.Tensor, u: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, list[float], int]:
        """From x [n, C, H, W], u [n, tokens, features] and c [1, tokens, features]: the new c in float32, the losses, the updates made."""
        t = pipe.scheduler.timesteps[0]
        embedding = c.detach().float().clone().requires_grad_(True)
        adam = torch.optim.AdamW([embedding], lr=self.lr)
        losses: list[float] = []
        for update in range(self.iterations):
            without, with_prompt = loop.both(pipe, x, t, u, embedding.to(u.dtype).expand_as(u))
            loss = torch.linalg.vector_norm(with_prompt - without, dtype=torch.float32)
            losses.append(loss.item())
            if self.target is not None and losses[-1] <= self.target:
                return embedding.detach(), losses, update
            (gradient,) = torch.autograd.grad(loss, [embedding])
            gradient[:, 0] = 0
            embedding.grad = gradient
            adam.step()
        return embedding.detach(), losses, self.iterations
