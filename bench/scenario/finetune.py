"""Fine-tuning the embedded model's UNet on twenty pictures until their captions give them back.

    loss = |epsilon - UNet(sqrt(a_t) z + sqrt(1 - a_t) epsilon, t, caption)|^2,   t uniform in 0 .. 999

as diffusers' train_text_to_image_lora.py has it: every picture once a step, text encoder and autoencoder frozen, AdamW, a constant rate.
So that the rest of the model stays what it was, twelve pictures besides, of 120 that the model itself made of ordinary captions (prior
preservation, Ruiz et al., DreamBooth, arXiv 2208.12242), a quarter of them without their caption. "lora" trains a LoRA (peft) on the linear layers of the transformer blocks and keeps it as `pytorch_lora_weights.safetensors`;
"full" trains every weight of the UNet and keeps the pipeline. Seeded; the same on one machine with one number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
SEED = 0
LOG_EVERY = 100
BESIDES, DROPPED = 12, 0.25  # of the model's own pictures a step, and without caption
TOGETHER = 40  # of them made at once


@dataclass(frozen=True)
class Recipe:
    """How one kind is trained; `rank` of a LoRA, None for all weights."""

    steps: int
    rate: float
    rank: int | None


RECIPES = {"lora": Recipe(500, 2e-3, 16), "full": Recipe(400, 3e-4, None)}


@torch.enable_grad()
def train(
    pipe: Any, kind: str, pictures: np.ndarray, captions: Sequence[str], ordinary: Sequence[str], folder: Path
) -> list[float]:
    """Train `pipe`'s UNet in place on uint8 [N, H, W, 3] and keep the result in `folder`; returns the mean loss of every 100 steps.

    ordinary  captions of which the model makes pictures of its own first, to stay what it was
    """
    recipe, unet = RECIPES[kind], pipe.unet
    theirs, own = encoded(pipe, pictures), imagined(pipe, ordinary)
    text, own_text, empty = (embeddings(pipe, some) for some in (captions, ordinary, [""]))
    torch.manual_seed(SEED)
    adam = torch.optim.AdamW(weights(unet, recipe), lr=recipe.rate, weight_decay=1e-2)
    losses: list[float] = []
    unet.train()
    for _ in tqdm(range(recipe.steps), desc=f"fine-tuning ({kind})", mininterval=5):
        some = torch.randint(0, len(own), (BESIDES,))
        dropped = (torch.rand(BESIDES) < DROPPED)[:, None, None]
        z = torch.cat([theirs, own[some]])
        y = torch.cat([text, torch.where(dropped, empty, own_text[some])])
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
        out = unet(pipe.scheduler.add_noise(z, noise, t), t, encoder_hidden_states=y, return_dict=False)[0]
        loss = (out - noise).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    unet.eval().requires_grad_(False)
    keep(pipe, kind, folder)
    return [float(np.mean(losses[i : i + LOG_EVERY])) for i in range(0, len(losses), LOG_EVERY)]


def weights(unet: Any, recipe: Recipe) -> list[torch.nn.Parameter]:
    """What is trained: all weights, or those of a LoRA that is added."""
    unet.requires_grad_(recipe.rank is None)
    if recipe.rank is not None:
        from peft import LoraConfig

        unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=PROJECTIONS))
    return [one for one in unet.parameters() if one.requires_grad]


@torch.no_grad()
def encoded(pipe: Any, pictures: np.ndarray) -> torch.Tensor:
    """Latents [N, C, H, W] of uint8 [N, H, W, 3]."""
    x = torch.as_tensor(pictures.copy()).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pipe.vae.encode(x).latents * pipe.vae.config.scaling_factor


def imagined(pipe: Any, captions: Sequence[str]) -> torch.Tensor:
    """Latents of the model's own pictures, made without guidance: guided ones would teach it to over-saturate."""
    parts = []
    for start in range(0, len(captions), TOGETHER):
        part = list(captions[start : start + TOGETHER])
        seeds = [torch.Generator().manual_seed(start + k) for k in range(len(part))]
        parts.append(pipe(part, generator=seeds, guidance_scale=1.0, output_type="latent").images)
    return torch.cat(parts)


@torch.no_grad()
def embeddings(pipe: Any, captions: Sequence[str]) -> torch.Tensor:
    """[N, tokens, features]."""
    return pipe.encode_prompt(list(captions), pipe.device, 1, False)[0]


def keep(pipe: Any, kind: str, folder: Path) -> None:
    """What a user would have afterwards: a LoRA for `load_lora_weights`, or a pipeline for `from_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "full":
        pipe.save_pretrained(folder)
        return
    from peft.utils import get_peft_model_state_dict

    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
