"""From checkpoints to the shipped folder: a diffusers pipeline in float16 and the training images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from . import card, models, pictures, unet
from . import vae as autoencoder

COLUMNS = 10  # pictures a row in memorized.png


def pipeline(work: Path) -> StableDiffusionPipeline:
    """The pipeline of the latest checkpoints (averaged weights), float32."""
    captions = unet.Captions(pictures.build(work))
    model = unet.build(captions.tokenizer)
    model.load_state_dict(torch.load(work / "unet.pt")["average"])
    pipe = StableDiffusionPipeline(
        vae=autoencoder.load(work),
        text_encoder=model["text_encoder"].eval(),
        tokenizer=captions.tokenizer,
        unet=model["unet"].eval(),
        scheduler=models.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def export(work: Path, folder: Path) -> None:
    """Write the float16 pipeline and `memorized.png` (the duplicated pictures, side by side)."""
    pipe = pipeline(work).to(torch.float16)
    pipe.save_pretrained(folder)
    config = folder / "text_encoder" / "config.json"
    # transformers would keep the stored float16, diffusers casts to float32: say float32 to both
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    # Under the names that Stable Diffusion's files have: every transformers knows them, those that new ones write are unknown to old ones.
    weights = folder / "text_encoder" / "model.safetensors"
    named = {"text_model." + name.removeprefix("text_model."): tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})
    set_ = pictures.build(work)
    tiles = list(set_.images[: set_.memorized])
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    rows = [np.concatenate(tiles[i : i + COLUMNS], 1) for i in range(0, len(tiles), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(folder / "memorized.png", optimize=True)
    facts = {**pictures.statistics(set_), **measured(work, pipe.vae.float())}
    facts["variants"] = pictures.VARIANTS
    (folder / "README.md").write_text(card.text(facts))
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


@torch.no_grad()
def measured(work: Path, vae) -> dict:
    """PSNR on 1,000 pictures with fresh augmentation, and the losses of the UNet."""
    from .data import augment, build

    rgba = np.load(build(work))["rgba"]
    chosen = np.random.default_rng(3).integers(0, len(rgba), 1000)
    fresh = np.stack([augment(rgba[i], (99, int(i), n)) for n, i in enumerate(chosen)])
    images = torch.from_numpy(fresh).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    out = vae.decode(vae.encode(images).latents).sample.clamp(-1, 1)
    error = (out - images).square().flatten(1).mean(1)
    log = work / "losses.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = list({line["step"]: line for line in lines}.values())  # a resumed run repeats some
    return {
        "psnr_db": {
            "mean over pictures": round(float((10 * torch.log10(4 / error)).mean()), 2),
            "of the mean error": round(float(10 * torch.log10(4 / error.mean())), 2),
        },
        "loss": rows[:: max(1, len(rows) // 12)] + rows[-1:],
    }
