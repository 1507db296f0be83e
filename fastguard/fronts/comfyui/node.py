"""The nodes: a patch of the model that guides under a policy, image by image, with any sampler; and its report as text."""

import logging
from typing import Any, ClassVar

from fastguard.fronts.comfyui.patch import Guarded
from fastguard.policies.fields import LARGEST_SCALE
from fastguard.policies.presets import DEFAULT, PRESETS
from fastguard.policies.presets import policy as make_policy

CATEGORY = "model_patches/fastguard"


class MemorizationGuard:
    """MODEL -> MODEL. `policy_file`, if given, replaces `policy`; `gate`, if above 0, replaces the policy's gate."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "patch", ("MODEL",)
    DESCRIPTION = "Keeps a diffusion model from copying its training images: guidance per image, begun when it is safe."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        gate: dict[str, Any] = {"default": 0.0, "min": 0.0, "max": LARGEST_SCALE, "step": 0.0001, "round": False}
        gate["tooltip"] = (
            "RMS(cond - uncond) from which a prompt is guarded, of epsilon (flow: velocity); 0: every prompt"
        )
        file = {"default": "", "tooltip": "path to a policy file (.json), as `fastguard calibrate` writes it"}
        return {
            "required": {"model": ("MODEL",), "policy": (list(PRESETS), {"default": DEFAULT}), "gate": ("FLOAT", gate)},
            "optional": {"policy_file": ("STRING", file)},
        }

    def patch(self, model: Any, policy: str, gate: float, policy_file: str = "") -> tuple[Any]:
        chosen = make_policy(policy_file or policy, **({"gate": gate} if gate > 0 else {}))
        if (warning := chosen.ungated_warning()) is not None:
            logging.warning(warning)
        patched = model.clone()
        # At cfg 1 ComfyUI leaves the unconditional branch out, without which nothing can be guarded.
        patched.set_model_sampler_post_cfg_function(Guarded(chosen), disable_cfg1_optimization=chosen.guarded)
        return (patched,)


class GuardReport:
    """(guarded MODEL, LATENT of its sampler) -> (the same LATENT, STRING): what happened in the model's last run."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "report", ("LATENT", "STRING")
    RETURN_NAMES: ClassVar = ("latent", "report")
    DESCRIPTION = "The guard's decision for each image of the sampler's last run. The latent passes through, so that this runs after it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    def report(self, model: Any, latent: Any) -> tuple[Any, str]:
        functions = model.model_options.get("sampler_post_cfg_function", [])
        reports = [one.report for one in functions if isinstance(one, Guarded)]
        if not reports:
            raise ValueError("model: must come from the Memorization Guard node")
        return latent, "\n".join("no run yet" if one is None else repr(one) for one in reports)
