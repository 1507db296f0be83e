"""The fixed measures: copy, similarity, faithfulness, blow-up. Defined here once, used everywhere.

All are taken on latents [B, 8, 8, 8] (unit variance per channel over the training set) or on the picture
decoded from them. z* is the latent of the prompt's training image, n = 512 its elements.

- **distance** = sqrt(mean((z - z*)^2)). **copy**: distance < COPY.
- **similarity** = <z, z*> / (|z| |z*|), the cosine of the latents; higher is more similar.
- **faithful**: the concept is the classifier's first choice for the decoded picture (`faithful5`: among
  its first five). The classifier never saw a generated or a memorized picture.
- **cycle** = sqrt(mean((encode(decode(z)) - z)^2)): a latent that no picture has does not survive the way
  through the autoencoder. **blow-up**: cycle > BLOWN or RMS(z) > LOUD.

docs/testbed/README.md lists what random pairs, other drawings of the same caption, the same drawing
augmented again and real pictures measure, from which the thresholds were taken.
"""

import torch
from diffusers import StableDiffusionPipeline

from . import Prompt, classifier, concepts, training_images

COPY = 0.5
BLOWN = 0.5
LOUD = 1.6


def to_tensor(images) -> torch.Tensor:
    """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32] in -1..1."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def distance(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of latents, per sample [B]."""
    return (z - target).square().flatten(1).mean(1).sqrt()


def similarity(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cosine of latents, per sample [B]."""
    return torch.cosine_similarity(z.flatten(1), target.flatten(1))


class Judge:
    """Measures generated latents of one pipeline (its autoencoder and the committed classifier)."""

    def __init__(self, pipe: StableDiffusionPipeline) -> None:
        self.vae = pipe.vae.float()
        self.classifier = classifier.load()
        self.names = {name: i for i, name in enumerate(concepts())}
        self.targets = self.encode(to_tensor(training_images().copy()))

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of pictures [N, 3, 32, 32]."""
        return torch.cat([self.vae.encode(part).latents for part in pictures.split(128)])

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, 32, 32] in -1..1 of latents, rounded to eight bits as a saved file is."""
        out = torch.cat([self.vae.decode(part).sample for part in z.float().split(128)])
        return out.clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)

    @torch.no_grad()
    def __call__(self, z: torch.Tensor, prompts: list[Prompt]) -> dict[str, list]:
        """Every measure, one value a sample; None where a prompt has no training image."""
        z = z.float().clone()
        z[~z.flatten(1).isfinite().all(1)] = 10.0
        pictures = self.decode(z)
        logits = torch.cat([self.classifier(part) for part in pictures.split(256)])
        label = torch.tensor([self.names[p.concept] for p in prompts])
        best = logits.topk(5).indices == label[:, None]
        cycle, loud = distance(self.encode(pictures), z), z.square().flatten(1).mean(1).sqrt()
        target = self.targets[[p.index or 0 for p in prompts]]
        far = distance(z, target)
        of_all = {"faithful": best[:, 0], "faithful5": best.any(1), "cycle": cycle, "rms": loud}
        of_all["blown"] = (cycle > BLOWN) | (loud > LOUD)
        of_memorized = {"distance": far, "similarity": similarity(z, target), "copy": far < COPY}
        result = {name: values.tolist() for name, values in of_all.items()}
        for name, values in of_memorized.items():
            result[name] = [v if p.memorized else None for v, p in zip(values.tolist(), prompts, strict=True)]
        return result
