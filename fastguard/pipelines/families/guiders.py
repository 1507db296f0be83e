"""Kind G: the calls and the combination of a row are those of a diffusers guider, `pipe.guider`."""

from dataclasses import dataclass
from typing import Any

from fastguard.pipelines.families.family import Arguments, Family, parts_of

TWO_PREDICTIONS = ["pred_cond", "pred_uncond"]
NO_BRANCH = "no negative branch: nothing to guard with"


@dataclass(frozen=True, kw_only=True)
class Guided(Family):
    """A guider calls the denoiser for pred_cond, then for pred_uncond, and combines them as it likes (rescale, APG, zero*, momentum);
    what it makes of an unguarded image reaches the scheduler as it is. Neither call is left out: a guider may remember predictions.

    guiders: the components, one of which guides a row; absent ones (None) are left out.
    """

    calls: int = 2
    order: tuple[str, str] = ("cond", "uncond")
    nonlinear: str | None = "whatever pipe.guider does"
    skippable: bool = False
    scale: str = "pipe.guider"
    second_branch: str = (
        "use a guider that guides from the first row on (enabled, start=0, a guidance_scale at which it does something)"
    )
    guiders: tuple[str, ...] = ("guider",)

    def refusal(self, pipe: Any, arguments: Arguments) -> str | None:
        found = parts_of(pipe, self.guiders)
        if not found:
            return f"pipe: this {type(pipe).__name__} has no guider (a distilled model?): {NO_BRANCH}"
        return next(filter(None, map(_problem, found, found.values())), None)

    def guidance_scale(self, pipe: Any, arguments: Arguments, denoiser: str) -> float:
        return effective_scale(self._at_work(pipe))

    def given(self, pipe: Any, arguments: Arguments) -> str:
        guider = self._at_work(pipe)
        return f"pipe.guider={type(guider).__name__}(guidance_scale={guider.guidance_scale}, start={guider._start}, enabled={guider._enabled})"

    def in_probe(self, pipe: Any) -> dict[str, Any]:
        """Plain guidance with the guiders' scales: what a guider does besides is its own affair, and its state stays as it is."""
        from diffusers import ClassifierFreeGuidance as Plain

        return {
            name: Plain(effective_scale(guider), start=guider._start, stop=guider._stop, enabled=guider._enabled)
            for name, guider in parts_of(pipe, self.guiders).items()
        }

    def _at_work(self, pipe: Any) -> Any:
        """The guider that was told of this row's timestep."""
        found = list(parts_of(pipe, self.guiders).values())
        return next((guider for guider in found if guider._timestep is pipe._current_timestep), found[0])


def effective_scale(guider: Any) -> float:
    """g of u + g (c - u); the original formulation is c + s (c - u)."""
    return float(guider.guidance_scale) + (1.0 if getattr(guider, "use_original_formulation", False) else 0.0)


def _problem(name: str, guider: Any) -> str | None:
    """Why a guider's images cannot be guarded."""
    what = f"pipe.{name}={type(guider).__name__}"
    if guider._input_predictions != TWO_PREDICTIONS:
        return f"{what}: a third branch enters its combination, which the guard would drop"
    if type(guider).__name__ == "AutoGuidance":
        return f"{what}: its second prediction is a weaker model's for the same prompt, {NO_BRANCH}"
    if not isinstance(getattr(guider, "guidance_scale", None), (int, float)):
        return f"{what}: it has no single guidance_scale"
    return None
