"""The end of the prompt made quiet: Kim and No, CVPR 2026 Findings, arXiv 2605.02908 ("... unexpectedly driven by CLIP embeddings").

CLIP's tokenizer for Stable Diffusion 1.x fills a prompt up with its end-of-text token, so that the one embedding that CLIP was trained
on stands there dozens of times. With the text encoder's tokens s, p_1 .. p_n, e, pad, pad, ... and their embeddings v:

- PaddingSwap   the padding is "!" instead (both branches, as released), and v_e = 0 in the conditional branch
- PaddingMask   v = 0 for the first 70% of the padding, conditional branch

No row more than plain guidance and no detector; only for pipelines with one CLIP text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CLIPTextModel

from bench.methods import loop
from bench.methods.base import Method, Request

FILLER = "!"


class _Padding(Method):
    def check(self, pipe: Any) -> None:
        super().check(pipe)
        if not isinstance(pipe.text_encoder, CLIPTextModel):
            raise TypeError(
                f"method {self.name!r} needs a CLIPTextModel: text_encoder is {type(pipe.text_encoder).__name__}"
            )

    def embeddings(self, pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """u and c [B, tokens, features]."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        u, c = self.embeddings(pipe, request.prompts)
        arguments = {**request.arguments, "prompt": None, "prompt_embeds": c, "negative_prompt_embeds": u}
        return pipe(**arguments).images, [{} for _ in request.prompts]


class PaddingSwap(_Padding):
    """The padding token is "!"; the end-of-text embedding of the prompt is zero."""

    def __init__(self, *, name: str = "padding-swap") -> None:
        self.filler, self.name = FILLER, name

    def embeddings(self, pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        filler = pipe.tokenizer.convert_tokens_to_ids(self.filler)
        c, u = (self.encode(pipe, tokens(pipe, some), filler) for some in (prompts, [""] * len(prompts)))
        for b, ids in enumerate(tokens(pipe, prompts)):
            c[b, len(ids) - 1] = 0
        return u, c

    @staticmethod
    def encode(pipe: Any, prompts: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
        """The text encoder's last hidden state [B, tokens, features] of prompts filled up with `filler`."""
        width = pipe.tokenizer.model_max_length
        ids = torch.tensor([[*one, *[filler] * (width - len(one))] for one in prompts], device=pipe._execution_device)
        return pipe.text_encoder(ids)[0].to(pipe.unet.dtype)


class PaddingMask(_Padding):
    """The first int(share * length) embeddings of the padding, those next to the end of the text, are zero."""

    def __init__(self, share: float = 0.7, *, name: str = "padding-mask") -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share!r}: must be 0 to 1")
        self.share, self.name = share, name

    def embeddings(self, pipe: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        u, c = loop.encode(pipe, prompts)
        c = c.clone()
        for b, ids in enumerate(tokens(pipe, prompts)):
            c[b, len(ids) : len(ids) + int((c.shape[1] - len(ids)) * self.share)] = 0
        return u, c


def tokens(pipe: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids from the start to the end-of-text token, both included, without padding."""
    shown = pipe.maybe_convert_prompt(list(prompts), pipe.tokenizer)
    return pipe.tokenizer(shown, max_length=pipe.tokenizer.model_max_length, truncation=True).input_ids
