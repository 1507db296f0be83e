"""The guard as a diffusers guider: for modular pipelines, and for any loop of one's own that asks a guider. Needs diffusers 0.36."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput

from fastguard.loop.report import Report
from fastguard.loop.stepwise import Stepwise
from fastguard.policies.plan import limit
from fastguard.policies.policy import Policy
from fastguard.policies.presets import DEFAULT
from fastguard.policies.presets import policy as make_policy


class GuardedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance under a policy, decided per image:

        e = u + g (c - u)    for an image that the guard holds (g of `fastguard.policies.policy`, s = guidance_scale)
        e as ClassifierFreeGuidance gives it, bit for bit, for every other

    policy           a preset's name, a path to a policy file, a `Policy` or its `to_dict()`; the config keeps the dictionary
    guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled  as of ClassifierFreeGuidance

    A run begins with `set_state(step=0, ...)`. Both branches run in every row of a guarded run, before `start` and after `stop` too:
    a conditional row alone is what copies. `enabled=False` (or `disable()`) is plain conditional output, without a guard.

    A guider sees two predictions and a timestep. So, unlike `fastguard.enable`, it cannot
    - fuse guidance with the scheduler's step, draw noise or record a graph: it is one operation among those of stock;
    - know the scheduler: the timesteps of set_state are taken for training steps, and mid-stages at timesteps of their own (KDPM2)
      for observations;
    - see the latents: `anchored` policies and magnitudes other than "output" are refused;
    - leave a branch out.
    A pipeline that stores its guider under diffusers' name saves the class by name only: save this one with `save_pretrained`.
    """

    @register_to_config
    def __init__(
        self,
        policy: str | Mapping[str, Any] | Policy = DEFAULT,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self.policy = Policy.from_dict(policy) if isinstance(policy, Mapping) else make_policy(policy)
        for one in self.policy.samples(self.policy.images or 1):
            if one.magnitude != "output":
                raise ValueError(
                    f"magnitude={one.magnitude!r}: must be 'output', because a guider does not know the scheduler"
                )
        self.register_to_config(policy=self.policy.to_dict())
        self._guide: Stepwise | None = None

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

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        stock = super().forward(pred_cond, pred_uncond)
        if not self._enabled or (pred_uncond is None and not self.policy.guarded):
            return stock
        if pred_uncond is None:
            raise ValueError(f"pred_uncond is None: policy {self.policy.name!r} needs both predictions")
        if self._guide is None:
            self._guide = self._begin(pred_uncond)
        self._guide.follow(self._scale)
        if self._timestep is None:
            self._guide.at(self._guide.row, torch.nan)
        else:
            self._guide.at(-self._timestep, self._timestep)
        stock["pred"] = self._guide(pred_uncond, pred_cond, combined=stock.pred)
        return stock

    def _begin(self, pred: torch.Tensor) -> Stepwise:
        policies = self.policy.samples(len(pred))
        for one in policies:
            if self._timestep is None and limit(one) is not None:
                raise ValueError(
                    f"policy {one.name!r} ends at timestep {limit(one):g}: call set_state before the first row"
                )
        return Stepwise(policies, guidance_scale=self._scale, latents=pred)

    @property
    def _scale(self) -> float:
        """g of u + g (c - u); the original formulation is c + s (c - u)."""
        return self.guidance_scale + (1.0 if self.use_original_formulation else 0.0)
