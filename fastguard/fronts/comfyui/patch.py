"""What ComfyUI calls after its own guidance in every evaluation of the model: the guard, for any sampler and model type.

ComfyUI hands over x0-predictions, x0(u) and x0(c), and its own combination of them. The guard works on

    eps(y) = (x - x0(y)) / sigma

which is the model's own output for epsilon and for flow models (there: the velocity), and epsilon for v-prediction; so d, the gate and
the report have the units of the diffusers pipelines. Only differences of predictions count, so x itself is left out:

    u = -x0(u) / sigma,   c = -x0(c) / sigma,   e = u + g (c - u),   x0 = -sigma e    for an image that the guard holds

and ComfyUI's own x0, bit for bit, for every other, whatever other nodes have done to it.
"""

from typing import Any

import torch

from fastguard.loop.guide import Stepwise
from fastguard.loop.report import Report
from fastguard.policies.policy import Policy

_SAME_LEVEL = 1.0 - 1e-6  # samplers that go through log(sigma) come back with another last bit


class Clock:
    """Noise levels of a model as timesteps and weights, by its `model_sampling`.

    in_steps: whether its timesteps count training steps, as t_star and deadline do. Fractions of the whole are taken as thousandths.
    """

    def __init__(self, sampling: Any) -> None:
        self._sampling = sampling
        last, first = (float(sampling.timestep(torch.as_tensor(s))) for s in (sampling.sigma_min, sampling.sigma_max))
        fractions = 0.0 <= last < first <= 1.0
        self._factor = 1000.0 if fractions else 1.0
        self.in_steps = fractions or (last >= 0.0 and first >= 10.0)
        self._flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._sampling.timestep(sigma) * self._factor

    def weights(self, sigma: float) -> tuple[float, float]:
        """Factors of d in epsilon and in x0 space."""
        return ((1.0 - sigma) ** 2 if self._flow else 1.0), sigma**2


class Guarded:
    """The post-CFG function of one patched model. A run begins with another schedule or batch, or back at its first sigma.

    An observation is the first evaluation at or below each sigma of the sampler's schedule (`sample_sigmas`): further evaluations of a
    sigma and mid-stages between two of them hold what was decided. ComfyUI has no table of them, so sigma is read from the device, one
    number per evaluation.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._guide: Stepwise | None = None
        self._schedule: Any = None  # of this run; kept, so that no later one can be taken for it
        self._first = self._lowest = 0.0  # sigmas of this run

    @property
    def report(self) -> Report | None:
        """What happened in the last run, per image; rows are evaluations. Waits for the device."""
        return None if self._guide is None else self._guide.report(path="ComfyUI")

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        """ComfyUI's args: denoised, cond_denoised, uncond_denoised, uncond, cond_scale, sigma, model, model_options -> denoised."""
        denoised, uncond = args["denoised"], args.get("uncond", ...)
        if uncond is None or (isinstance(uncond, list) and not uncond):
            if self.policy.guarded or self.policy.sets_scale:
                raise ValueError(
                    f"policy {self.policy.name!r}: this sampler runs no negative branch, so there is nothing to guard with; use a guider "
                    "with a negative prompt (KSampler, CFGGuider), and a model that is not distilled to run without one"
                )
            return denoised
        sigma = float(args["sigma"].max())
        if self._begins(args, sigma):
            self._begin(args, sigma)
        self._lowest = min(self._lowest, sigma)
        guide, clock = self._guide, self._clock
        assert guide is not None
        guide.follow(args["cond_scale"])
        timestep = clock.timestep(args["sigma"].flatten()[:1])
        # x0(e) = 0 x - sigma e, as the guard's e leaves x out.
        guide.at(self._level(sigma), timestep, *clock.weights(sigma), x0=(0.0, -sigma))
        u, c, own = (args[name] / -sigma for name in ("uncond_denoised", "cond_denoised", "denoised"))
        e = guide(u, c, combined=own)
        return torch.where(e == own, denoised, e * -sigma)

    def _begins(self, args: dict[str, Any], sigma: float) -> bool:
        if self._guide is None or _schedule(args) is not self._schedule or self._lowest < self._first <= sigma:
            return True
        x, denoised = self._guide.loop.x, args["denoised"]
        return (x.shape, x.device) != (denoised.shape, denoised.device)

    def _begin(self, args: dict[str, Any], sigma: float) -> None:
        self._schedule, self._first, self._lowest = _schedule(args), sigma, sigma
        self._levels = None if self._schedule is None else self._schedule.tolist()
        self._clock = Clock(args["model"].model_sampling)
        latents = args["denoised"]
        self._guide = Stepwise(
            self.policy.samples(len(latents)),
            guidance_scale=args["cond_scale"],
            latents=latents,
            in_steps=self._clock.in_steps,
            observations=None if self._levels is None else len({level for level in self._levels if level > 0}),
        )

    def _level(self, sigma: float) -> float:
        """Grows with every sigma of the schedule that is reached; with every lower sigma where the schedule is not known."""
        return -sigma if self._levels is None else sum(level >= sigma * _SAME_LEVEL for level in self._levels)


def _schedule(args: dict[str, Any]) -> torch.Tensor | None:
    """The sampler's sigmas: every run has a tensor of its own."""
    return args.get("model_options", {}).get("transformer_options", {}).get("sample_sigmas")
