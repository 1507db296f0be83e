"""Training of the UNet together with the text encoder, on latents of the whole training set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import models, parallel, pictures
from . import vae as autoencoder

BATCH = 96
RATE = 1e-3
SHARPEN_RATE = 5e-4
LARGEST_WEIGHT = 20.0
DROP = 0.1  # share of captions replaced by the empty one
EMA = 0.999
SAVE_EVERY = 100
LOG_EVERY = 50


@dataclass(frozen=True)
class Course:
    """What the training of one model differs in from another's.

    build: the work folder -> its pictures with the number of copies of each. seed: of the first weights; seed + 2 of what is drawn.
    name: of the checkpoint and the cached latents.
    steps: in all. sharpen: from this step on, at SHARPEN_RATE, the error is weighted by 1 + min(1/SNR(t), LARGEST_WEIGHT): the loss in v space, but
    for the limit. Unweighted, the first steps of sampling (SNR below 0.01) hardly count, and what a caption changes there stays unlearned for
    pictures with few copies: the gate cannot see them. Weighted from the start, with 6,500 steps, they were learned later still.
    double: from this step on the duplicated pictures are drawn twice as often. Until it the model learns what the captions mean; with the plain
    factors throughout, a third of the way showed no copy and too few exposures (about 400) were left.
    """

    build: Callable[[Path], pictures.Pictures]
    seed: int = 0
    name: str = "unet"
    steps: int = 6000
    sharpen: int = 4200
    double: int | None = 1400

    def rate(self, step: int) -> float:
        """Learning rate: one schedule until `sharpen`, a second one from there."""
        if step < self.sharpen:
            return parallel.learning_rate(step, self.sharpen, RATE)
        return parallel.learning_rate(step - self.sharpen, self.steps - self.sharpen, SHARPEN_RATE)


SHIPPED = Course(lambda work: pictures.build(work))  # looked up when called: tests put a small set there


def latents(work: Path, course: Course = SHIPPED) -> torch.Tensor:
    """Latents [N, 8, 8, 8] of all pictures (cached), by the autoencoder in `work`."""
    path = work / ("latents.pt" if course is SHIPPED else f"{course.name}-latents.pt")
    if not path.exists():
        set_, vae = course.build(work), autoencoder.load(work)
        index = torch.arange(len(set_.images)).split(512)
        bar = tqdm(index, desc="latents", unit="batch", mininterval=5)
        parallel.save(torch.cat([autoencoder.encode(vae, set_.tensor(i)) for i in bar]), path)
    return torch.load(path)


class Captions:
    """Token ids of every caption that a picture may carry; row 0 is the empty caption."""

    def __init__(self, set_: pictures.Pictures) -> None:
        options = set_.captions()
        texts = ["", *sorted({text for texts in options for text in texts})]
        self.tokenizer = models.tokenizer()
        self.ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        row = {text: i for i, text in enumerate(texts)}
        self.options = [torch.tensor([row[text] for text in texts]) for texts in options]

    def draw(self, index: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        """One caption for each picture, a tenth of them empty: ids [B, 16]."""
        choice = torch.rand(len(index), generator=source)
        rows = [self.options[i] for i in index.tolist()]
        picked = torch.stack([r[int(c * len(r))] for r, c in zip(rows, choice, strict=True)])
        empty = torch.rand(len(index), generator=source) < DROP
        return self.ids[picked.masked_fill(empty, 0)]


def build(tokenizer, seed: int = SHIPPED.seed) -> nn.ModuleDict:
    """UNet and text encoder, untrained, from a fixed seed."""
    torch.manual_seed(seed)
    parts = {"unet": models.make_unet(), "text_encoder": models.make_text_encoder(tokenizer)}
    return nn.ModuleDict(parts).to(memory_format=torch.channels_last)


def loss_weights(scheduler) -> torch.Tensor:
    """w(t) = 1 + min(1/SNR(t), LARGEST_WEIGHT), divided by its mean over t: [1000] float32."""
    alphas = scheduler.alphas_cumprod.double()
    weights = 1 + ((1 - alphas) / alphas).clamp(max=LARGEST_WEIGHT)
    return (weights / weights.mean()).float()


@torch.no_grad()
def update_average(average: dict, model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights, with a short start."""
    decay = min(EMA, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)


def train(rank: int, world: int, work: str, limit: int | None = None, course: Course = SHIPPED) -> None:
    """Minimise |epsilon - UNet(x_t, t, caption)|^2 over the course's batches, weighted at the end; checkpoint `unet.pt`."""
    folder = Path(work)
    set_, z = course.build(folder), latents(folder, course)
    captions, scheduler = Captions(set_), models.make_scheduler()
    model = build(captions.tokenizer, course.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    weights, path, step = torch.from_numpy(set_.copies).double(), folder / f"{course.name}.pt", 0
    doubled = weights.clone()
    doubled[: set_.memorized] *= 2
    sharpening = loss_weights(scheduler)
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, step = state["average"], state["step"]
    end, local, losses = min(course.steps, limit or course.steps), BATCH // world, []
    bar = tqdm(total=end, initial=step, desc=course.name, disable=rank > 0, mininterval=10)
    while step < end:
        sharpen = step >= course.sharpen
        for group in optimiser.param_groups:
            group["lr"] = course.rate(step)
        source = parallel.generator(course.seed + 2, step, rank)
        chances = doubled if course.double is not None and step >= course.double else weights
        index = torch.multinomial(chances, local, replacement=True, generator=source)
        x0 = z[index]
        noise = torch.randn(x0.shape, generator=source)
        # stratified timesteps: every step sees the whole range of noise levels
        place = (torch.arange(local) + torch.rand(local, generator=source)) / local
        t = (place * scheduler.config.num_train_timesteps).long()
        noisy = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        text = model["text_encoder"](captions.draw(index, source)).last_hidden_state
        error = (model["unet"](noisy, t, text).sample - noise).square().flatten(1).mean(1)
        loss = (error * sharpening[t] if sharpen else error).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(model.parameters(), world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        update_average(average, model, step)
        step += 1
        losses.append(error.mean().item())
        bar.update()
        if rank > 0:
            continue
        if step % LOG_EVERY == 0:
            mean = sum(losses) / len(losses)
            losses.clear()
            bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
            with (folder / ("losses.jsonl" if course is SHIPPED else f"{course.name}-losses.jsonl")).open("a") as log:
                log.write(json.dumps({"step": step, "loss": round(mean, 5)}) + "\n")
        if step % SAVE_EVERY == 0 or step == end:
            state = {"model": model.state_dict(), "average": average, "step": step}
            parallel.save({**state, "optimiser": optimiser.state_dict()}, path)
