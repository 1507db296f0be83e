"""The library's anchored preset against the plain loop, which shares nothing with it: shares and latents on three schedulers and all prediction types."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

import fastguard
from bench.testbed.anchored import denoiser, noise
from bench.testbed.anchored_loop import Form, sample
from fastguard.testbed import prompts
from fastguard.testbed.sampling import Sample, generator

STEPS, SCALE = 10, 3.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_shares_and_latents_are_those_of_the_loop(pipe, family, kind):
    batch = [Sample(p, 0) for p in (*prompts("D", "tuning")[:3], *prompts("ordinary", "tuning")[:1])]
    texts = [job.prompt.prompt for job in batch]
    kept, pipe.scheduler = pipe.scheduler, family.from_config(pipe.scheduler.config, prediction_type=kind)
    try:
        guard = fastguard.enable(pipe, "anchored")
        try:
            found = pipe(
                texts,
                generator=[generator(job) for job in batch],
                num_inference_steps=STEPS,
                guidance_scale=SCALE,
                output_type="latent",
            ).images
            shares = torch.tensor([one.share_curve for one in guard.report])
        finally:
            guard.disable()
        scheduler = family.from_config(pipe.scheduler.config)
        expected, of_rows = sample(denoiser(pipe, texts), scheduler, noise(batch), STEPS, SCALE, Form())
    finally:
        pipe.scheduler = kept
    size = expected.abs().amax().clamp(min=1)
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-4)
    torch.testing.assert_close(shares.T, torch.stack(of_rows), rtol=1e-4, atol=1e-4)
