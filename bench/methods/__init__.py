"""The methods of the benchmark behind one interface: prompts and generators in, latents, denoiser rows and seconds out.

    generated = methods()["og+dtp"]()(pipe, prompts, generators, num_inference_steps=50, guidance_scale=7.5)

Every method starts from the noise that stock draws from the same generators, so seeds are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import fastguard
from bench.methods.base import Generated, Method
from bench.methods.interval import Interval
from bench.methods.preset import Preset
from bench.methods.reference import Dynamic, Opposite, Static
from bench.methods.ren import Ren
from bench.methods.somepalli import EmbeddingNoise, Words
from bench.methods.stock import Compiled, Stock
from bench.methods.wen import Wen
from fastguard import testbed

__all__ = [
    "Compiled",
    "Dynamic",
    "EmbeddingNoise",
    "Factory",
    "Generated",
    "Interval",
    "Method",
    "Opposite",
    "Preset",
    "Ren",
    "Static",
    "Stock",
    "Wen",
    "Words",
    "methods",
]

JAIN = "Jain et al., CVPR 2025, arXiv 2411.16738"
WEN = "Wen et al., ICLR 2024: embedding optimised at the first step until ||c - u|| <="
SOMEPALLI = "Somepalli et al., NeurIPS 2023, arXiv 2305.20086:"
WEN_TARGETS = (
    0.2,
    0.5,
    1.0,
    3.0,
)  # the paper's tables have 1 and 3; the first two are about as much for the embedded model


@dataclass(frozen=True)
class Factory:
    """Makes a method; keyword arguments override its parameters. `source`: where the method is published."""

    build: Callable[..., Any]
    source: str

    def __call__(self, **parameters: Any) -> Method:
        return self.build(**parameters)


def methods(*, gate: float | None = None) -> dict[str, Factory]:
    """All methods by name, those of `fastguard` twice: as they are, and as NAME-gated.

    gate  tau of the gated ones, RMS(c - u); None: that of the embedded model's policy file, which means nothing for other models
    """
    file = testbed.policy_path()
    tau = fastguard.policy(file).gate if gate is None else gate
    found = {
        "none": Factory(Stock, "stock diffusers: classifier-free guidance, Ho and Salimans 2022, arXiv 2207.12598")
    }
    for name in fastguard.PRESETS:
        found[name] = Factory(partial(Preset, name), f"fastguard's preset {name}, after {JAIN}")
        if fastguard.PRESETS[name].guarded:
            source = f"fastguard's preset {name} for images whose first RMS(c - u) is {tau} or more"
            found[f"{name}-gated"] = Factory(partial(Preset, name, gate=tau, name=f"{name}-gated"), source)
    found["embedded-policy"] = Factory(
        partial(Preset, file, name="embedded-policy"), "the policy file of fastguard's embedded model"
    )
    for target in WEN_TARGETS:
        found[f"wen-{target:g}"] = Factory(partial(Wen, target), f"{WEN} {target:g}")
    found["ren"] = Factory(
        Ren, "Ren et al., ECCV 2024, arXiv 2403.11052: cross-attention, c1 = 1.25 on the first token"
    )
    found["random-numbers"] = Factory(partial(Words, "numbers"), f"{SOMEPALLI} four random numbers in the prompt")
    found["random-words"] = Factory(partial(Words, "words"), f"{SOMEPALLI} four random tokens in the prompt")
    found["word-repeat"] = Factory(partial(Words, "repeat"), f"{SOMEPALLI} four words of the prompt repeated in it")
    found["embedding-noise"] = Factory(EmbeddingNoise, f"{SOMEPALLI} Gaussian noise of 0.1 on both embeddings")
    found["interval"] = Factory(
        Interval, "Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724: guidance for 0.28 < sigma <= 5.42 only"
    )
    released = f"the script released with {JAIN}, mended, one image at a time:"
    found["reference-dtp"] = Factory(Dynamic, f"{released} dynamic transition, conditional-only before")
    found["reference-stp"] = Factory(Static, f"{released} static transition at 500, unconditional before")
    found["reference-og+stp"] = Factory(
        partial(Static, 650.0, -2.0, name="reference-og+stp"),
        f"{released} static transition at 650, guidance -2 before",
    )
    found["reference-og+dtp"] = Factory(Opposite, f"{released} opposite guidance, transition from a whole pass before")
    found["compile"] = Factory(Compiled, "stock diffusers with torch.compile of the UNet")
    return found
