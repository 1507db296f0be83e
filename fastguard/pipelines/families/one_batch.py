"""Kind B: one denoiser call a row for both branches, combined by the pipeline."""

from __future__ import annotations

from typing import Any

import torch

from fastguard.pipelines.families.base import Arguments
from fastguard.pipelines.families.own import OwnFamily

RESCALE = "guidance_rescale (optional)"


def _one(name: str, *pipelines: str, **facts: Any) -> OwnFamily:
    return OwnFamily(name=name, pipelines=pipelines, **facts)


def _squeezed(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    return output.squeeze(2)  # one frame


def _unpacked_video(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    """Tokens to [B, C, F, H, W] without the first frame, which is the user's."""
    unpacked = pipe._unpack_latents(
        output,
        given["num_frames"],
        given["height"],
        given["width"],
        pipe.transformer_spatial_patch_size,
        pipe.transformer_temporal_patch_size,
    )
    return unpacked[:, :, 1:]


def _after_first_frame(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    return output[:, :, 1:]  # the first is the user's


def _free_init(pipe: Any, arguments: Arguments) -> str | None:
    if getattr(pipe, "free_init_enabled", False):
        return (
            "enable_free_init: its loop runs several times, and the guard's state would begin anew; disable_free_init()"
        )
    return None


_SD3_CONTROLNET = ("StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline")

ONE_BATCH: tuple[OwnFamily, ...] = (
    _one(
        "z-image",
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageOmniPipeline",
        order=("cond", "uncond"),
        sign=-1,
        to_step=_squeezed,
        live=True,
        offset=1.0,
        nonlinear="cfg_normalization: the norm is clamped, image by image",
        second_branch="pass guidance_scale above 0 to a model that is not distilled (Turbo is run with 0)",
    ),
    _one("sana", "SanaPipeline", "SanaControlNetPipeline", "SanaVideoPipeline"),
    _one("hidream", "HiDreamImagePipeline", sign=-1, live=True),
    _one("ltx", "LTXPipeline", live=True, nonlinear=RESCALE),
    _one("ltx, conditioned", "LTXConditionPipeline", sign=-1, live=True, nonlinear=RESCALE),
    _one("ltx, image to video", "LTXImageToVideoPipeline", to_step=_unpacked_video, live=True, nonlinear=RESCALE),
    _one(
        "cogvideox",
        "CogVideoXPipeline",
        "CogVideoXFunControlPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "ConsisIDPipeline",
        live=True,
    ),
    _one("auraflow", "AuraFlowPipeline"),
    _one("mochi", "MochiPipeline", live=True),
    _one("allegro", "AllegroPipeline"),
    _one("latte", "LattePipeline"),
    _one("cogview 3", "CogView3PlusPipeline", live=True),
    _one(
        "animatediff",
        "AnimateDiffPipeline",
        "AnimateDiffControlNetPipeline",
        "AnimateDiffSparseControlNetPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        denoisers=("unet",),
        refused=_free_init,
    ),
    _one(
        "animatediff xl",
        "AnimateDiffSDXLPipeline",
        denoisers=("unet",),
        live=True,
        nonlinear=RESCALE,
        refused=_free_init,
    ),
    _one("stable-diffusion-3 controlnet", *_SD3_CONTROLNET, live=True),
    _one("kolors", "KolorsPipeline", "KolorsImg2ImgPipeline", denoisers=("unet",), live=True),
    _one(
        "stable-diffusion relatives, live scale",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionXLAdapterPipeline",
        denoisers=("unet",),
        live=True,
        nonlinear=RESCALE,
    ),
    _one(
        "stable-diffusion relatives",
        "BlipDiffusionControlNetPipeline",
        "LDMTextToImagePipeline",
        "StableDiffusionImageVariationPipeline",
        "StableDiffusionUpscalePipeline",
        "StableUnCLIPImg2ImgPipeline",
        denoisers=("unet",),
    ),
    _one(
        "stable video diffusion",
        "StableVideoDiffusionPipeline",
        denoisers=("unet",),
        scale="max_guidance_scale",
        nonlinear="a scale for each frame",
        second_branch="pass max_guidance_scale above 1",
    ),
    _one("hunyuan-dit", "HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline", nonlinear=RESCALE),
    _one(
        "deepfloyd if",
        "IFPipeline",
        "IFImg2ImgPipeline",
        "IFImg2ImgSuperResolutionPipeline",
        "IFInpaintingPipeline",
        "IFInpaintingSuperResolutionPipeline",
        "IFSuperResolutionPipeline",
        denoisers=("unet",),
    ),
    _one(
        "kandinsky 2",
        "KandinskyPipeline",
        "KandinskyImg2ImgPipeline",
        "KandinskyInpaintPipeline",
        "KandinskyV22ControlnetPipeline",
        "KandinskyV22ControlnetImg2ImgPipeline",
        denoisers=("unet",),
    ),
    _one(
        "kandinsky 2.2",
        "KandinskyV22Pipeline",
        "KandinskyV22Img2ImgPipeline",
        "KandinskyV22InpaintPipeline",
        denoisers=("unet",),
        live=True,
    ),
    _one(
        "kandinsky prior",
        "KandinskyPriorPipeline",
        "KandinskyV22PriorPipeline",
        "KandinskyV22PriorEmb2EmbPipeline",
        denoisers=("prior",),
    ),
    _one("kandinsky 3", "Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline", denoisers=("unet",), offset=1.0),
    _one(
        "stable cascade prior",
        "StableCascadePriorPipeline",
        denoisers=("prior",),
        order=("cond", "uncond"),
        live=True,
    ),
    _one(
        "stable cascade decoder",
        "StableCascadeDecoderPipeline",
        denoisers=("decoder",),
        order=("cond", "uncond"),
        live=True,
    ),
    _one(
        "easyanimate",
        "EasyAnimatePipeline",
        "EasyAnimateControlPipeline",
        "EasyAnimateInpaintPipeline",
        nonlinear=RESCALE,
    ),
    _one("ernie image", "ErnieImagePipeline"),
    _one("prx", "PRXPipeline"),
    _one("anyflow", "AnyFlowPipeline"),
    _one("bria fibo", "BriaFiboPipeline", "BriaFiboEditPipeline", live=True),
    _one(
        "bria",
        "BriaPipeline",
        live=True,
        nonlinear="normalize (optional): a standard deviation over the whole batch, guarded images in it",
    ),
    _one("audioldm 2", "AudioLDM2Pipeline", denoisers=("unet",)),
    _one("stable audio", "StableAudioPipeline"),
    _one("stable audio 3", "StableAudio3Pipeline", live=True),
    _one(
        "ace-step",
        "AceStepPipeline",
        order=("cond", "uncond"),
        nonlinear="adaptive projected guidance with momentum, in an interval of the rows",
    ),
    _one("sana, image to video", "SanaImageToVideoPipeline", to_step=_after_first_frame),
)
