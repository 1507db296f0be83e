"""The guard as a diffusers guider: for modular pipelines, and for any loop of one's own that asks a guider."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput

from fastguard.fronts.seen import Seen
from fastguard.loop.guide import Guide
from fastguard.loop.report import Report
from fastguard.policies.policy import Policy
from fastguard.policies.presets import BLIND
from fastguard.policies.presets import policy as make_policy


class GuardedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance under a policy, decided per image:

        e = u + g (c - u)    for an image that the guard holds (g of `fastguard.policies.policy`, s = guidance_scale)
        e as ClassifierFreeGuidance gives it, bit for bit, for every other

    policy     a preset's name, a path to a policy file, a `Policy` or its `to_dict()`; the config keeps the dictionary
    scheduler  set it (`guider.scheduler = pipe.scheduler`) for what needs noise levels: anchored policies, magnitudes other than "output",
               mid-stages that are no observations. Without it the timesteps of set_state are taken for training steps
    the other arguments are those of ClassifierFreeGuidance

    A run begins with `set_state(step=0, ...)`. Both branches run in every row of a guarded run, before `start` and after `stop` too:
    a conditional row alone is what copies. `enabled=False` (or `disable()`) is plain conditional output, without a guard.

    A guider sees predictions, timesteps and, by a hook of `prepare_models`, the model's input. Unlike `fastguard.enable` it cannot fuse
    guidance with the scheduler's step, draw noise, record a graph, or leave a branch out.
    A pipeline that stores its guider under diffusers' name saves the class by name only: save this one with `save_pretrained`.
    """

    scheduler: Any = None

    @register_to_config
    def __init__(
        self,
        policy: str | Mapping[str, Any] | Policy = BLIND,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self.policy = Policy.from_dict(policy) if isinstance(policy, Mapping) else make_policy(policy)
        self.register_to_config(policy=self.policy.to_dict())
        self._guide: Guide | None = None
        self._seen = Seen()

    @property
    def report(self) -> Report | None:
        """What happened so far in the last run, per image; None before the first row. Waits for the device."""
        return None if self._guide is None else self._guide.report(path="guider")

    @property
    def num_conditions(self) -> int:
        return 2 if self._enabled and self.policy.guarded else super().num_conditions

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._guide = None

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self.scheduler is not None:
            self._seen.watch(denoiser)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        super().cleanup_models(denoiser)
        self._seen.leave()

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        stock = super().forward(pred_cond, pred_uncond)
        if not self._enabled or (pred_uncond is None and not self.policy.guarded):
            return stock
        if pred_uncond is None:
            raise ValueError(f"pred_uncond is None: policy {self.policy.name!r} needs both predictions")
        if self._guide is None:
            policies = self.policy.samples(len(pred_uncond))
            self._guide = self._seen.begin(self.scheduler, policies, self._scale, pred_uncond, self._timestep)
        self._guide.follow(self._scale)
        x = self._seen.row(self._guide, pred_uncond, self._timestep)
        stock["pred"] = self._guide(pred_uncond, pred_cond, x, combined=stock.pred)
        return stock

    @property
    def _scale(self) -> float:
        """g of u + g (c - u); the original formulation is c + s (c - u)."""
        return self.guidance_scale + (1.0 if self.use_original_formulation else 0.0)
