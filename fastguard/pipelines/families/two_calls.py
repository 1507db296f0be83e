"""Kind P: two denoiser calls a row, the conditional one first, combined by the pipeline."""

from __future__ import annotations

from typing import Any

from fastguard.pipelines.families.base import Arguments
from fastguard.pipelines.families.own import OwnFamily

TRUE_CFG = (
    "pass negative_prompt (or its embeddings) and true_cfg_scale above 1 (guidance_scale is an input of the model here)"
)
NEGATIVE = "pass guidance_scale above 1 and a negative_prompt, even an empty one"
RENORMALISED = "the guided output gets the conditional one's norm, token by token"


def _two(name: str, *pipelines: str, **facts: Any) -> OwnFamily:
    return OwnFamily(name=name, pipelines=pipelines, calls=2, order=("cond", "uncond"), **facts)


def _distilled(pipe: Any, arguments: Arguments) -> str | None:
    if getattr(pipe.config, "is_distilled", False):
        return (
            f"pipe: this {type(pipe).__name__} is distilled (is_distilled): no negative branch, nothing to guard with; "
            "the base model has one"
        )
    return None


TWO_CALLS: tuple[OwnFamily, ...] = (
    _two(
        "flux, true CFG",
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxKontextPipeline",
        "FluxKontextInpaintPipeline",
        scale="true_cfg_scale",
        second_branch=TRUE_CFG,
    ),
    _two(
        "qwen-image",
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
        scale="true_cfg_scale",
        norm=-1,
        nonlinear=RENORMALISED,
        second_branch=TRUE_CFG,
    ),
    _two(
        "hunyuan-video, true CFG",
        "HunyuanVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
        scale="true_cfg_scale",
        second_branch=TRUE_CFG,
    ),
    _two(
        "wan",
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVACEPipeline",
        "LucyEditPipeline",
        denoisers=("transformer", "transformer_2"),
        scales={"transformer": "guidance_scale", "transformer_2": "guidance_scale_2"},
    ),
    _two("wan, one transformer", "WanVideoToVideoPipeline", "SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
    _two("flux.2 klein", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline", refused=_distilled),
    _two("chroma", "ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
    _two("ovis", "OvisImagePipeline"),
    _two("cogview 4", "CogView4Pipeline", "CogView4ControlPipeline", live=True),
    _two("bria fibo 2", "BriaFibo2Pipeline", live=True),
    _two("glm-image", "GlmImagePipeline", live=True, skippable=False),  # kv caches
    _two("longcat audio", "LongCatAudioDiTPipeline", live=True),
    _two(
        "longcat image",
        "LongCatImagePipeline",
        "LongCatImageEditPipeline",
        live=True,
        norm=-1,
        nonlinear="enable_cfg_renorm: the norm is pulled to the conditional one's, token by token",
    ),
    _two("lumina 2", "Lumina2Pipeline", sign=-1, norm=-1, nonlinear="cfg_normalization: the conditional output's norm"),
    _two(
        "nucleus",
        "NucleusMoEImagePipeline",
        sign=-1,
        norm=-1,
        nonlinear=RENORMALISED,
        second_branch=NEGATIVE,
    ),
    _two("krea 2", "Krea2Pipeline", offset=1.0, second_branch="pass guidance_scale above 0", refused=_distilled),
    _two(
        "kandinsky 5",
        "Kandinsky5T2VPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5I2IPipeline",
        second_branch=NEGATIVE,
    ),
    _two(
        "kandinsky 5, image to video",
        "Kandinsky5I2VPipeline",
        to_step=lambda pipe, output, given: output[:, 1:],  # the first frame is the user's
        second_branch=NEGATIVE,
    ),
    _two("joy-image edit", "JoyImageEditPipeline", live=True, norm=2, nonlinear="the conditional output's norm"),
)
