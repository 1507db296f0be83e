"""Whole generations on the embedded model: a guarded pipeline against stock, in alternating pairs.

    python -m bench.pipeline [--batch 8] [--steps 50] [--pairs 20] [--schedulers DDIM ...] [--policies dtp ...] [--json FILE]

`stp` skips the conditional branch before t* = 500, a quarter of the denoiser's rows; `dtp` needs both branches throughout. Before
anything is timed the guarded pipeline under `cfg` is checked against stock's latents. Half of the rows take more than half of the time where
a denoiser is as small as the embedded one: that is measured, too, and what that leaves for
`stp` at best, were everything else free.
"""

from __future__ import annotations

import argparse
import platform
from functools import partial
from pathlib import Path

import diffusers
import torch

import fastguard
from bench.pairs import Ratios, alternating
from fastguard import testbed
from fastguard.files import write_json

SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler.from_config,
    "DPM++ 2M": diffusers.DPMSolverMultistepScheduler.from_config,
}


def measure(
    model: Path | None, batch: int, steps: int, pairs: int, schedulers: list[str], policies: list[str]
) -> dict[str, dict[str, Ratios]]:
    """Ratio guarded / stock for every scheduler and policy."""
    results: dict[str, dict[str, Ratios]] = {}
    for name in schedulers:
        make = SCHEDULERS[name]
        stock, guarded = (_load(model, make) for _ in range(2))

        def run(pipe, steps=steps):
            generator = [torch.Generator().manual_seed(i) for i in range(batch)]
            return pipe(
                ["a red apple"] * batch,
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
            ).images

        with fastguard.enable(guarded, "cfg"):
            ours, theirs = run(guarded), run(stock)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
        results[name] = {}
        for policy in policies:
            with fastguard.enable(guarded, policy):
                results[name][policy] = alternating(
                    partial(run, guarded),
                    partial(run, stock),
                    pairs=pairs,
                    progress=f"{name}, {policy}",
                )
    return results


def denoiser_alone(model: Path | None, batch: int, rows: int, pairs: int) -> Ratios:
    """Seconds of the denoiser for `rows` rows as the guard runs it, over those of stock for 2 * `batch`."""
    pipe = _load(model, SCHEDULERS["DDIM"])
    c = pipe.unet.config
    sample = torch.randn(2 * batch, c.in_channels, c.sample_size, c.sample_size)
    embeds, _ = pipe.encode_prompt("a red apple", "cpu", 2 * batch, False)

    @torch.no_grad()
    def run(rows: int) -> None:
        for _ in range(10):
            pipe.unet(sample[:rows], 500, encoder_hidden_states=embeds[:rows])

    return alternating(partial(run, rows), partial(run, 2 * batch), pairs=pairs, progress=f"denoiser, {rows} rows")


def _load(model: Path | None, make) -> diffusers.StableDiffusionPipeline:
    pipe = (
        testbed.load()
        if model is None
        else diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
    )
    pipe.scheduler = make(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        help="a Stable Diffusion pipeline's folder; default: the embedded model",
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--schedulers", nargs="+", choices=list(SCHEDULERS), default=list(SCHEDULERS))
    parser.add_argument("--policies", nargs="+", default=["cfg", "dtp", "stp"], help="presets or policy files")
    parser.add_argument("--json", type=Path, help="write all ratios to this file")
    options = parser.parse_args()
    try:
        for one in options.policies:
            fastguard.policy(one)
    except (ValueError, OSError) as error:
        parser.error(f"--policies: {error}")
    results = measure(options.model, options.batch, options.steps, options.pairs, options.schedulers, options.policies)
    print(
        f"batch {options.batch}, {options.steps} steps, float32, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    )
    print("| scheduler | policy | seconds of fastguard / stock |\n|---|---|---|")
    for scheduler, by_policy in results.items():
        for policy, ratios in by_policy.items():
            print(f"| {scheduler} | {policy} | {ratios} |")
    half, full = (
        denoiser_alone(options.model, options.batch, rows, options.pairs) for rows in (options.batch, 2 * options.batch)
    )
    print(
        f"denoiser as guarded / stock's {2 * options.batch} rows: {options.batch} rows {half}, {2 * options.batch} rows {full}"
    )
    print(f"which leaves for stp {(full.median + half.median) / 2:.3f}")
    if options.json:
        values = {s: {p: r.values for p, r in by.items()} for s, by in results.items()}
        write_json(
            options.json,
            {"torch": torch.__version__, "diffusers": diffusers.__version__, "ratios": values},
        )


if __name__ == "__main__":
    main()
