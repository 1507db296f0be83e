"""The methods of the benchmark behind one interface: prompts and generators in, latents, denoiser rows and seconds out.

    generated = methods()["og+dtp"]()(pipe, prompts, generators, num_inference_steps=50, guidance_scale=7.5)

Every method starts from the noise that stock draws from the same generators, so seeds are paired.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import fastguard
from bench.methods.base import Generated, Method
from bench.methods.han import HanBatch, HanSample
from bench.methods.interval import Interval
from bench.methods.look import FirstLook
from bench.methods.padding import PaddingMask, PaddingSwap
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
    "FirstLook",
    "Generated",
    "HanBatch",
    "HanSample",
    "Interval",
    "Method",
    "Opposite",
    "PaddingMask",
    "PaddingSwap",
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
HAN = "Han et al., NeurIPS 2025, arXiv 2510.08625: initial noise moved to where ||c - u|| is small,"
KIM = "Kim and No, CVPR 2026 Findings, arXiv 2605.02908:"
CLIP = "one CLIP text encoder"
SOMEPALLI = "Somepalli et al., NeurIPS 2023, arXiv 2305.20086:"
WEN_TARGETS = (
    0.2,
    0.5,
    1.0,
    3.0,
)  # the paper's tables have 1 and 3; the first two are about as much for the embedded model


@dataclass(frozen=True)
class Factory:
    """Makes a method; keyword arguments override its parameters.

    source  where the method is published
    needs   what it asks for beyond plain guidance: rows, backward passes, a kind of encoder; "" for nothing
    """

    build: Callable[..., Any]
    source: str
    needs: str = ""

    def __call__(self, **parameters: Any) -> Method:
        return self.build(**parameters)


def methods(*, gate: float | None = None, policy: str | os.PathLike[str] | None = None) -> dict[str, Factory]:
    """All methods by name, those of `fastguard` twice: as they are, and as NAME-gated; a policy file as it is, and as NAME-ungated.

    gate    tau of the gated ones, RMS(c - u); None: that of the policy file
    policy  a policy file, as the method "policy"; None: the embedded model's as "embedded-policy", which means nothing for other models
    """
    file, file_name = (testbed.policy_path(), "embedded-policy") if policy is None else (policy, "policy")
    tau = fastguard.policy(file).gate if gate is None else gate
    two = "both branches at the gate's row"
    found = {
        "none": Factory(Stock, "stock diffusers: classifier-free guidance, Ho and Salimans 2022, arXiv 2207.12598")
    }
    for name in fastguard.PRESETS:
        found[name] = Factory(partial(Preset, name), f"fastguard's preset {name}, after {JAIN}")
        if fastguard.PRESETS[name].guarded:
            source = f"fastguard's preset {name} for images whose first RMS(c - u) is {tau} or more"
            found[f"{name}-gated"] = Factory(partial(Preset, name, gate=tau, name=f"{name}-gated"), source, two)
    whose = (
        "the policy file of fastguard's embedded model" if policy is None else f"the policy file {os.fspath(policy)}"
    )
    found[file_name] = Factory(partial(Preset, file, name=file_name), whose, two)
    ungated = f"{file_name}-ungated"
    found[ungated] = Factory(partial(Preset, file, gate=None, name=ungated), f"{whose}, without its gate")
    for target in WEN_TARGETS:
        needs = "two rows and a backward pass an image and update, at most 10 updates"
        found[f"wen-{target:g}"] = Factory(partial(Wen, target), f"{WEN} {target:g}", needs)
    found["ren"] = Factory(
        Ren,
        "Ren et al., ECCV 2024, arXiv 2403.11052: cross-attention, c1 = 1.25 on the first token",
        "cross-attention to text",
    )
    found["han-batch"] = Factory(
        HanBatch,
        f"{HAN} two updates without gradients, then no guidance for 5 steps",
        "8 rows an image before the first step; saves 5",
    )
    found["han-sample"] = Factory(
        HanSample,
        f"{HAN} each image by AdamW until ||c - u|| <= 0.9 (for 16,384 elements)",
        "two rows and a backward pass an image and update, at most 1,000 updates",
    )
    found["padding-swap"] = Factory(PaddingSwap, f'{KIM} "!" for the padding, the end-of-text embedding zero', CLIP)
    found["padding-mask"] = Factory(PaddingMask, f"{KIM} 70% of the padding's embeddings zero", CLIP)
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
    found["first-look"] = Factory(
        FirstLook, "no guard: the first conditional prediction x0(c), and what detectors know after five rows"
    )
    found["compile"] = Factory(Compiled, "stock diffusers with torch.compile of the UNet")
    return found
