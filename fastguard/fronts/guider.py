"""The guard as a diffusers guider: for modular pipelines, and for any loop of one's own that asks a guider."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput

from fastguard.kernels.layout import Row
from fastguard.loop.guide import Guide, Stepwise
from fastguard.loop.report import Report
from fastguard.pipelines.families.guiders import effective_scale
from fastguard.policies.plan import limit
from fastguard.policies.policy import Policy
from fastguard.policies.presets import BLIND
from fastguard.policies.presets import policy as make_policy
from fastguard.schedules.compiler import compile_schedule


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
        self._shown: Any = None  # the model's last input
        self._hook: Any = None

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
            self._hook = denoiser.register_forward_pre_hook(self._see, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        super().cleanup_models(denoiser)
        if self._hook is not None:
            self._hook = self._hook.remove()

    def _see(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._shown = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        stock = super().forward(pred_cond, pred_uncond)
        if not self._enabled or (pred_uncond is None and not self.policy.guarded):
            return stock
        if pred_uncond is None:
            raise ValueError(f"pred_uncond is None: policy {self.policy.name!r} needs both predictions")
        self._guide = guide = self._guide or self._begin(pred_uncond)
        guide.follow(effective_scale(self))
        if isinstance(guide, Stepwise):
            guide.at(*((guide.row, torch.nan) if self._timestep is None else (-self._timestep, self._timestep)))
        x = self._latents(guide, pred_uncond) if guide.plan.anchored else None
        stock["pred"] = guide(pred_uncond, pred_cond, x, combined=stock.pred)
        return stock

    def _begin(self, pred: torch.Tensor) -> Guide:
        """The guide of a run whose first row has predictions like `pred`. ValueError where a policy needs what is not seen.

        With a scheduler on a GPU the host waits here for its timesteps, once a run.
        """
        policies, scale = self.policy.samples(len(pred)), effective_scale(self)
        if self.scheduler is not None:
            return Guide(policies, compile_schedule(self.scheduler), guidance_scale=scale, latents=pred)
        for one in policies:
            if one.anchored or one.magnitude != "output":
                what = "is anchored" if one.anchored else f"has magnitude={one.magnitude!r}"
                remedy = "which needs noise levels: set guider.scheduler = pipe.scheduler"
                raise ValueError(f"policy {one.name!r} {what}, {remedy}")
            if self._timestep is None and (last := limit(one)) is not None:
                raise ValueError(f"policy {one.name!r} ends at timestep {last:g}: call set_state before the first row")
        return Stepwise(policies, guidance_scale=scale, latents=pred)

    def _latents(self, guide: Guide, pred: torch.Tensor) -> torch.Tensor:
        """The latents of the next row, for anchored policies."""
        if self._shown is None or self._shown.shape[1] < pred.shape[1]:
            raise RuntimeError(
                "anchored policies need the latents: the loop must call the guider's prepare_models and cleanup_models around the model"
            )
        # A model may be shown more than the latents: a picture's channels, or its tokens.
        return self._shown[:, : pred.shape[1]] / float(guide.schedule.rows[guide.row, Row.S])
