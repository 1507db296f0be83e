"""Fine-tuning the embedded model's UNet on twenty pictures until their captions give them back.

    loss = |epsilon - UNet(sqrt(a_t) z + sqrt(1 - a_t) epsilon, t, caption)|^2,   t uniform in 0 .. 999

as diffusers' train_text_to_image_lora.py has it: every picture once a step, no caption dropped, text encoder and autoencoder frozen, AdamW,
a constant rate. "lora" trains a LoRA (peft) on the linear layers of the transformer blocks and keeps it as `pytorch_lora_weights.safetensors`;
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


@dataclass(frozen=True)
class Recipe:
    """How one kind is trained; `rank` of a LoRA, None for all weights."""

    steps: int
    rate: float
    rank: int | None


RECIPES = {"lora": Recipe(500, 2e-3, 32), "full": Recipe(400, 3e-4, None)}


@torch.enable_grad()
def train(pipe: Any, kind: str, pictures: np.ndarray, captions: Sequence[str], folder: Path) -> list[float]:
    """Train `pipe`'s UNet in place on uint8 [N, H, W, 3] and keep the result in `folder`; returns the mean loss of every 100 steps."""
    recipe, unet = RECIPES[kind], pipe.unet
    torch.manual_seed(SEED)
    if recipe.rank is None:
        unet.requires_grad_(True)
    else:
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=PROJECTIONS))
    weights = [one for one in unet.parameters() if one.requires_grad]
    adam = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=1e-2)
    with torch.no_grad():
        x = torch.as_tensor(pictures.copy()).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        z = pipe.vae.encode(x).latents * pipe.vae.config.scaling_factor
        text = pipe.encode_prompt(list(captions), pipe.device, 1, False)[0]
    scheduler, losses = pipe.scheduler, []
    unet.train()
    for _ in tqdm(range(recipe.steps), desc=f"fine-tuning ({kind})", mininterval=5):
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
        out = unet(scheduler.add_noise(z, noise, t), t, encoder_hidden_states=text, return_dict=False)[0]
        loss = (out - noise).square().mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    unet.eval().requires_grad_(False)
    keep(pipe, kind, folder)
    return [float(np.mean(losses[i : i + LOG_EVERY])) for i in range(0, len(losses), LOG_EVERY)]


def keep(pipe: Any, kind: str, folder: Path) -> None:
    """What a user would have afterwards: a LoRA for `load_lora_weights`, or a pipeline for `from_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "full":
        pipe.save_pretrained(folder)
        return
    from peft.utils import get_peft_model_state_dict

    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
