"""The guider in a real modular pipeline: the blocks of HunyuanVideo 1.5 that denoise, on a tiny random transformer."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

if not hasattr(diffusers, "HunyuanVideo15ModularPipeline"):
    pytest.skip("modular HunyuanVideo 1.5 came with a later diffusers", allow_module_level=True)
from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15CoreDenoiseStep

import fastguard
from fastguard.fronts.guider import GuardedGuidance
from tests.families.tiny_guiders import CASES, STEPS, branch, hunyuan_video


def denoised(stock: Any, guider: Any, batch: int = 2) -> torch.Tensor:
    pipe = HunyuanVideo15CoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=stock.transformer, scheduler=stock.scheduler, vae=stock.vae, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    case = CASES["hunyuan-video 1.5"]
    latents = torch.randn(batch, 4, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    given = {**case.fixed, **branch(case, 1), **branch(case, 2, "negative_")}
    return pipe(**given, batch_size=batch, num_inference_steps=STEPS, latents=latents, output="latents")


def test_a_modular_pipeline_is_guarded_by_its_guider() -> None:
    stock = hunyuan_video()
    plain = denoised(stock, diffusers.ClassifierFreeGuidance(4.0))
    assert torch.equal(denoised(stock, GuardedGuidance("cfg", 4.0)), plain)
    policies = fastguard.Policy.stack([fastguard.policy("stp", t_star=0), fastguard.policy("dtp", gate=100.0)])
    guider = GuardedGuidance(policies, 4.0)
    guarded = denoised(stock, guider)
    zero = denoised(stock, diffusers.ClassifierFreeGuidance(0.0))
    torch.testing.assert_close(guarded[0], zero[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(guarded[1], plain[1]) and not torch.equal(guarded[0], plain[0])
    assert [image.denoiser_rows for image in guider.report] == [2 * STEPS] * 2
