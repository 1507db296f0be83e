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
from bench.methods.preset import Preset
from bench.methods.stock import Compiled, Stock
from fastguard import testbed

__all__ = ["Compiled", "Factory", "Generated", "Method", "Preset", "Stock", "methods"]

JAIN = "Jain et al., CVPR 2025, arXiv 2411.16738"


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
    found["compile"] = Factory(Compiled, "stock diffusers with torch.compile of the UNet")
    return found
