"""RMS(c - u) of prompts on a pipeline, as the gate compares it: what a gate is calibrated on, and what screening looks at."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from fastguard.pipelines.guard import enable

UNREACHED = 1e30  # a gate that observes every image and catches none: all get plain guidance


def collect_gate_statistics(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: int = 1,
    seed: int = 0,
    gate_steps: int = 1,
    batch_size: int = 16,
    progress: bool = False,
    **call: Any,
) -> list[float]:
    """Per prompt, the largest RMS(c - u) over `seeds` seeds and the first `gate_steps` observations, as the gate itself compares it.

    Image i uses the generator seeded with seed + i. call: arguments of the pipeline as it will be used (num_inference_steps,
    guidance_scale, height ..., and negative_prompt, one text for all). ValueError for empty prompts, numbers below 1 or outputs that
    are not finite.
    """
    if not prompts or min(seeds, gate_steps, batch_size) < 1:
        raise ValueError("prompts must not be empty; seeds, gate_steps and batch_size must be >= 1")
    work = [prompt for prompt in prompts for _ in range(seeds)]
    if "negative_prompt" in call:
        call["negative_prompt"] = [call["negative_prompt"]] * len(work)
    call |= {"gate_steps": gate_steps, "batch_size": batch_size, "progress": progress}
    found = list(early_reports(pipe, work, range(seed, seed + len(work)), **call))
    return [max(image.gate["rms"] for image in found[i : i + seeds]) for i in range(0, len(work), seeds)]


def early_reports(
    pipe: Any,
    prompt: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: Sequence[str] | None = None,
    gate_steps: int = 1,
    to_mid_run: bool = False,
    batch_size: int = 16,
    progress: bool = False,
    **call: Any,
) -> Iterator[Any]:
    """The `ImageReport` of each text with its seed under plain guidance, as it is known after `gate_steps` observations, where the call is interrupted.

    to_mid_run   go on to the row that `collapse` looks at
    call         of the pipeline, the same for all images

    A guard that was on comes back. ValueError for a scale without a second branch and for outputs that are not finite.
    """
    if "callback_on_step_end" in call:
        raise ValueError("callback_on_step_end is used here to stop each call early")
    if not call.get("guidance_scale", 7.5) > 1:
        raise ValueError(
            f"guidance_scale={call['guidance_scale']!r}: must be above 1, else there is no second branch to compare with"
        )
    levels: set[float] = set()

    def stop(pipeline: Any, step: int, timestep: Any, values: dict) -> dict:
        # Some schedulers observe a single one of several evaluations, at most two noise levels apart (PNDM's Runge-Kutta steps).
        if step == 0:
            levels.clear()
        levels.add(float(timestep))
        observed = gate_steps == 1 or len(levels) > 2 * gate_steps
        pipeline._interrupt = observed and (not to_mid_run or step >= len(pipeline.scheduler.timesteps) // 2)
        return values

    try:
        with enable(pipe, "paper-dtp", gate=UNREACHED, gate_steps=gate_steps) as guard:
            for start in tqdm(range(0, len(prompt), batch_size), disable=not progress, desc="observing"):
                part = slice(start, start + batch_size)
                negative = {} if negative_prompt is None else {"negative_prompt": list(negative_prompt[part])}
                pipe(
                    prompt=list(prompt[part]),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    output_type="latent",
                    callback_on_step_end=stop,
                    **negative,
                    **call,
                )
                for text, image in zip(prompt[part], guard.report or (), strict=True):
                    if image.non_finite is not None or image.gate is None or image.gate["rms"] is None:
                        raise ValueError(f"prompt {text!r}: cond or uncond is not finite, so it has no statistic")
                    yield image
    finally:
        pipe._interrupt = False
