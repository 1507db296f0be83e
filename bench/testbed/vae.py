"""Training of the autoencoder: both halves, then whitened latents, then the decoder alone."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from tqdm import tqdm

from . import models, parallel, pictures
from .data import Unavailable

JOINT_STEPS = 900
DECODER_STEPS = 500
BATCH = 64
RATE = 2e-3
NOISE = 0.1  # added to the latents: the decoder must bear small errors of the UNet
SAVE_EVERY = 100


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Latents [N, 8, 8, 8] of pictures [N, 3, 32, 32]."""
    return torch.cat([vae.encode(part).latents for part in images.split(batch)])


@torch.no_grad()
def whiten(vae: AutoencoderTiny, images: torch.Tensor) -> None:
    """Fold the ZCA whitening of the latents over channels into the encoder's last convolution.

    z' = M (z - mean), M = C^(-1/2), C = cov(z) over pictures and places. The decoder's first
    convolution takes M^-1; the clamp before it and the padding make that approximate, which the
    decoder-only phase repairs.
    """
    z = encode(vae, images).transpose(0, 1).flatten(1).double()
    mean, cov = z.mean(1), torch.cov(z)
    values, vectors = torch.linalg.eigh(cov)
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    backward = torch.linalg.inv(forward)
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    weight = last.weight.double()
    last.weight.copy_(torch.einsum("oc,cikl->oikl", forward, weight))
    last.bias.copy_(forward @ (last.bias.double() - mean))
    weight = first.weight.double()
    first.bias.add_(torch.einsum("ockl,c->o", weight, mean))
    first.weight.copy_(torch.einsum("ockl,cd->odkl", weight, backward))


def train(rank: int, world: int, work: str, limit: int | None = None) -> None:
    """Train and save `vae.pt` (the checkpoint) in `work`; continues where it stopped."""
    folder = Path(work)
    torch.manual_seed(0)
    vae = models.make_vae().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    set_ = pictures.build(folder)
    path, step = folder / "vae.pt", 0
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    total = JOINT_STEPS + DECODER_STEPS
    end = min(total, limit or total)
    local = BATCH // world
    bar = tqdm(total=end, initial=step, desc="autoencoder", disable=rank > 0, mininterval=5)
    while step < end:
        joint = step < JOINT_STEPS
        if step in (0, JOINT_STEPS):  # at 0 it is a data-dependent start
            sample = torch.randperm(len(set_.images), generator=parallel.generator(11))[:4096]
            whiten(vae, set_.tensor(sample))
        vae.encoder.requires_grad_(joint)
        phase = (step, JOINT_STEPS) if joint else (step - JOINT_STEPS, DECODER_STEPS)
        for group in optimiser.param_groups:
            group["lr"] = parallel.learning_rate(*phase, RATE if joint else RATE / 2)
        draw = parallel.generator(1, step, rank)
        index = torch.randint(len(set_.images), (local,), generator=draw)
        images = set_.tensor(index).contiguous(memory_format=torch.channels_last)
        z = vae.encode(images).latents
        noise = torch.randn(z.shape, generator=draw) * NOISE
        out = vae.decode(z + noise).sample
        error = F.mse_loss(out, images)
        loss = error + 0.1 * F.l1_loss(out, images)
        if joint:
            loss = loss + 1e-2 * (z.square().mean() - 1).square()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(vae.parameters(), world)
        torch.nn.utils.clip_grad_norm_([p for p in vae.parameters() if p.grad is not None], 1.0)
        optimiser.step()
        step += 1
        bar.update()
        if step % 20 == 0:
            bar.set_postfix_str(f"psnr {10 * torch.log10(4 / error).item():.1f} dB", refresh=False)
        if rank == 0 and (step % SAVE_EVERY == 0 or step == end):
            state = {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            parallel.save(state, path)


def load(work: Path) -> AutoencoderTiny:
    """The trained autoencoder, in evaluation mode. `Unavailable` if there is none."""
    if not (path := work / "vae.pt").exists():
        raise Unavailable(f"no {path}: `python -m bench.testbed train` makes it")
    vae = models.make_vae()
    vae.load_state_dict(torch.load(path)["model"])
    return vae.eval().requires_grad_(False)
