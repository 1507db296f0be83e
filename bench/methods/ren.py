"""Cross-attention moved to the first token: Ren et al., ECCV 2024, "Unveiling and mitigating memorization ... cross attention"."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from bench.methods.base import Method, Request


class Ren(Method):
    """In every cross-attention, before the softmax,

        logit[b, h, i, j] = q_i . k_j / sqrt(features per head)
        logit[b, h, i, 0] *= c1                      conditional half only
        logit[b, h, i, j]  = -inf  for j >= n_b      both halves

    n_b is the number of tokens of image b's prompt, BOS and EOS among them: what is masked is the padding. The released code
    finds the conditional half by `[1::2]`, which is right for one image; here it is the second half of the batch, for any.

    A logit is linear in its key, so the first line is done by multiplying k_0 by c1, and the mask is the UNet's own
    `encoder_attention_mask`: whatever attention the pipeline runs, runs on.
    """

    def __init__(self, c1: float = 1.25, *, name: str = "ren") -> None:
        self.c1, self.name = c1, name

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        keep = self.keep(pipe, request.prompts)

        def mask(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, {**kwargs, "encoder_attention_mask": torch.cat([keep, keep])}

        def more(_: torch.nn.Module, __: tuple[Any, ...], keys: torch.Tensor) -> torch.Tensor:
            keys = keys.clone()
            keys[keys.shape[0] // 2 :, 0] *= self.c1
            return keys

        with ExitStack() as hooks:
            hooks.callback(pipe.unet.register_forward_pre_hook(mask, with_kwargs=True).remove)
            for layer in pipe.unet.modules():
                if isinstance(layer, Attention) and layer.is_cross_attention:
                    hooks.callback(layer.to_k.register_forward_hook(more).remove)
            return pipe(**request.arguments).images, [{} for _ in request.prompts]

    def keep(self, pipe: Any, prompts: list[str]) -> torch.Tensor:
        """bool [B, tokens]: j < n_b."""
        width = pipe.tokenizer.model_max_length
        tokens = pipe.tokenizer(
            pipe.maybe_convert_prompt(prompts, pipe.tokenizer), max_length=width, truncation=True
        ).input_ids
        lengths = torch.tensor([len(ids) for ids in tokens], device=pipe._execution_device)
        return torch.arange(width, device=lengths.device) < lengths[:, None]
