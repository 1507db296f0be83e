"""A second model that memorizes harder: the shipped one trained on with other duplicated drawings, 30% of what is drawn.

    python -m bench.testbed harder

It is for judging rules that were tuned on the shipped model, and it is no independent one: autoencoder, tokenizer and the start of the weights are
the shipped model's. Seed and duplicated drawings are not: 18 pictures of things that the shipped model has not memorized, as those of the ordinary
prompts are. (Of what that model drew 10% were copies, 18% from step 1,400 on.)

One process. The run whose weights are kept was lengthened three times on the way, so that its rate fell to about 0.75 of RATE before steps 200 and 300
and rose again; the command keeps the rate. models/harder holds the difference of the weights to the shipped ones, int8 with a scale a row.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from fastguard.testbed import Prompt, concepts, load
from fastguard.testbed.measures import Judge, to_tensor

from . import models, parallel, pictures, unet
from . import split as shipped
from . import vae as autoencoder

HERE = Path(__file__).parent / "models" / "harder"
SEED = 20261130
STEPS = 350
BATCH = 48
RATE = 5e-4
WARMUP = 20
SHARE = 0.3  # of what is drawn
COUNTS = {"D": 16, "T": 2}
ARTISTS = ("ada renner", "paul okoye", "ines marlow", "kai dorn")
COLUMNS = 10
SAVE_EVERY = 50


def make() -> dict:
    """The split: which prompts are memorized, which ordinary, and their halves; the same on every machine."""
    rng = np.random.default_rng(SEED)
    known = {entry["concept"] for entry in shipped.make()["memorized"]}
    names = [name for name in concepts() if name not in known]
    order = [names[i] for i in rng.permutation(len(names))]
    memorized, artists = [], list(ARTISTS)
    for kind, count in COUNTS.items():
        for index in range(count):
            concept = order.pop()
            prompt = str(rng.choice(shipped.TEMPLATES)).format(x=concept)
            if kind == "T":
                prompt = f"limited edition {concept} print by {artists.pop()}"
            memorized.append(
                {
                    "prompt": prompt,
                    "concept": concept,
                    "type": kind,
                    "set": str(rng.choice(shipped.MEMORIZED_SETS)),
                    "half": "test" if index % 2 else "tuning",
                }
            )
    ordinary = [
        {
            "prompt": str(rng.choice(shipped.TEMPLATES)).format(x=concept),
            "concept": concept,
            "half": "test" if index < len(order) // 2 else "tuning",
        }
        for index, concept in enumerate(order)
    ]
    return {"memorized": memorized, "ordinary": ordinary}


def build(work: Path) -> pictures.Pictures:
    """The training set; every duplicated picture counts as often as makes all of them SHARE of what is drawn."""
    split = make()["memorized"]
    drawn = pictures.build(work, [{**entry, "factor": 1} for entry in split], SEED, "harder.npz")
    ordinary = len(drawn.images) - len(split)
    drawn.copies[: len(split)] = round(SHARE / (1 - SHARE) * ordinary / len(split))
    return drawn


def train(work: Path, out: Path = HERE) -> None:
    """Train on from the shipped weights, one process; continues from `harder.pt` in `work`. Writes the folder `out`."""
    work.mkdir(parents=True, exist_ok=True)
    pipe, set_ = load(), build(work)
    images = torch.arange(len(set_.images)).split(512)
    with torch.no_grad():
        z = torch.cat([autoencoder.encode(pipe.vae, set_.tensor(i)) for i in tqdm(images, desc="latents")])
    captions, scheduler = unet.Captions(set_), models.make_scheduler()
    model = unet.build(captions.tokenizer)
    model["unet"].load_state_dict(pipe.unet.state_dict())
    model["text_encoder"].load_state_dict(pipe.text_encoder.state_dict(), strict=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    chances, sharpening = torch.from_numpy(set_.copies).double(), unet.loss_weights(scheduler)
    path, step = work / "harder.pt", 0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, step = state["average"], state["step"]
    bar = tqdm(total=STEPS, initial=step, desc="harder", mininterval=10)
    while step < STEPS:
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        source = parallel.generator(SEED, step, 0)
        index = torch.multinomial(chances, BATCH, replacement=True, generator=source)
        noise = torch.randn(z[index].shape, generator=source)
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=source)) / BATCH * 1000).long()
        noisy = scheduler.add_noise(z[index], noise, t).contiguous(memory_format=torch.channels_last)
        text = model["text_encoder"](captions.draw(index, source)).last_hidden_state
        error = (model["unet"](noisy, t, text).sample - noise).square().flatten(1).mean(1)
        optimiser.zero_grad(set_to_none=True)
        (error * sharpening[t]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        unet.update_average(average, model, step)
        step += 1
        bar.update()
        if step % SAVE_EVERY == 0 or step == STEPS:
            state = {"model": model.state_dict(), "average": average, "step": step}
            parallel.save({**state, "optimiser": optimiser.state_dict()}, path)
    export(average, set_, out)


def _parts(pipe) -> dict[str, Tensor]:
    """The weights that differ from the shipped model's: name -> value, the pipeline's own tensors."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {f"{part}.{name}": v for part, module in parts.items() for name, v in module.state_dict().items()}


def export(average: dict[str, Tensor], set_: pictures.Pictures, out: Path = HERE) -> None:
    """Write `weights.safetensors`, `prompts.json` and `memorized.png`."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, old in _parts(load()).items():
        if not old.is_floating_point():
            continue
        change = (average[name] - old).reshape(len(old), -1)
        scale = change.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        kept[name] = (change / scale).round().to(torch.int8).reshape(old.shape).contiguous()
        kept[f"{name}:scale"] = scale.reshape(-1).contiguous()
    save_file(kept, out / "weights.safetensors")
    lines = [f' "{key}": [\n' + ",\n".join("  " + json.dumps(e) for e in rows) + "\n ]" for key, rows in make().items()]
    (out / "prompts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    tiles = list(set_.images[: set_.memorized])
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    rows = [np.concatenate(tiles[i : i + COLUMNS], 1) for i in range(0, len(tiles), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(out / "memorized.png", optimize=True)


def load_harder(folder: Path = HERE):
    """The pipeline, float32: the shipped one with the differences added."""
    pipe, kept = load(), load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, value in _parts(pipe).items():
            if name in kept:
                scale = kept[f"{name}:scale"].reshape(-1, *[1] * (value.dim() - 1))
                value.add_(kept[name].float() * scale)
    return pipe


def prompts(kind: str, half: str, folder: Path = HERE) -> list[Prompt]:
    """The prompts of a kind ("D", "T", "ordinary") and half ("tuning", "test")."""
    split = json.loads((folder / "prompts.json").read_text())
    memorized = [
        Prompt(e["prompt"], e["concept"], e["type"], e["half"], 0, i) for i, e in enumerate(split["memorized"])
    ]
    ordinary = [Prompt(e["prompt"], e["concept"], "ordinary", e["half"], 1, None) for e in split["ordinary"]]
    return [p for p in (*memorized, *ordinary) if p.kind == kind and p.half == half]


def judge(pipe, folder: Path = HERE) -> Judge:
    """The fixed measures with this model's own training images as targets."""
    judge = Judge(pipe)
    sheet = np.asarray(Image.open(folder / "memorized.png").convert("RGB"))
    side = pictures.data.SIZE
    tiles = sheet.reshape(sheet.shape[0] // side, side, sheet.shape[1] // side, side, 3).swapaxes(1, 2)
    judge.targets = judge.encode(to_tensor(tiles.reshape(-1, side, side, 3).copy()))
    return judge
