"""A pipeline that combines the branches itself, at real size: Wan 2.1's 1.3 billion parameters, random weights, text to video.

python -m bench.gpu_own [--pairs 20]    on a CPU, at a third of its width and 4 of its 30 layers: guarded against stock, in turn
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch

import fastguard
from bench.gpu_timing import Results, close, rounds
from bench.pairs import alternating

# As published: Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json.
WAN: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
VIDEO = {"height": 480, "width": 832, "num_frames": 17}
TEXT = 512  # tokens
STEPS = 6
ON_A_CPU = {"num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 4}, {"height": 128, "width": 128, "num_frames": 5}
GUARDS = {"guarded, plain guidance": "cfg", "guarded, dtp": "dtp", "guarded, anchored": "anchored"}


def transformer(device: str, size: Mapping[str, Any] = WAN) -> Any:
    """The model made on the device (its tables of rotations are buffers, which an empty model would not have), bfloat16."""
    with torch.device(device):
        model = diffusers.WanTransformer3DModel(**size)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def pipeline(model: Any) -> Any:
    """Text to video up to the latents: pass embeddings. `model` is a WanTransformer3DModel."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ways(model: Any, video: Mapping[str, int] = VIDEO, steps: int = STEPS) -> Mapping[str, Callable[[], torch.Tensor]]:
    """Stock, and the same with a guard that leaves everything alone and with one that decides: latents of one call from the same noise."""
    device, dtype = model.device, model.dtype
    draw = torch.Generator().manual_seed(0)
    c, u = (torch.randn(1, TEXT, model.config.text_dim, generator=draw).to(device, dtype) for _ in range(2))
    arguments = {"prompt_embeds": c, "negative_prompt_embeds": u, "guidance_scale": 5.0, "output_type": "latent"}

    def call(pipe: Any) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        return pipe(**arguments, **video, num_inference_steps=steps, generator=generator).frames

    made = {"stock": partial(call, pipeline(model))}
    for name, policy in GUARDS.items():
        pipe = pipeline(model)
        fastguard.enable(pipe, policy)
        made[name] = partial(call, pipe)
    return made


def difference(works: Mapping[str, Callable[[], torch.Tensor]]) -> float:
    """Of plain guidance under the guard from stock, relative to the largest value: the combination is the pipeline's own, so 0."""
    stock, guarded = (works[name]().float() for name in ("stock", "guarded, plain guidance"))
    return ((guarded - stock).abs().max() / stock.abs().max()).item()


def own_combination(size: Mapping[str, Any] = WAN, video: Mapping[str, int] = VIDEO, device: str = "cuda") -> Results:
    """Wan 2.1 at its size, random weights, bfloat16: stock and guarded, seconds of a call; values first."""
    works = ways(transformer(device, size), video)
    found = close(difference(works))
    yield {**video, "steps": STEPS, "difference": found, "times": rounds(works, most=6, seconds=30)}


def main() -> None:
    """Ratios of seconds on a CPU, float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    size, video = ON_A_CPU
    works = ways(transformer("cpu", {**WAN, **size}).float(), video)
    print(f"Wan, {size}, {video}, {STEPS} steps, {torch.get_num_threads()} threads; difference {difference(works):g}")
    for name in GUARDS:
        print(f"{name} / stock {alternating(works[name], works['stock'], pairs=pairs, progress=name)}")


if __name__ == "__main__":
    main()
