"""Why a pipeline class is not guarded, by name."""

from __future__ import annotations

NO_BRANCH = "no negative branch: nothing to guard with"
THIRD = "a third branch enters its combination, which the guard would drop"

_SECTIONS = "its loop runs in sections, and the guard's state would begin anew in each"
_COPIES = "its loop steps deep copies of the scheduler, which the guard does not see"
_SEVERAL = "several schedulers step in one row, and the guard knows one"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline", "DiffusionGemmaPipeline", "DreamLiteMobilePipeline",
            "FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline", "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline", "FluxFillPipeline", "Flux2Pipeline", "Flux2KleinKVPipeline", "Kandinsky6SRPipeline",
            "LatentConsistencyModelImg2ImgPipeline", "LatentConsistencyModelPipeline", "LDMSuperResolutionPipeline", "LLaDA2Pipeline",
            "LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline", "MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline",
            "MarigoldNormalsPipeline", "RFD4ProteinaPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaWMLTX2Refiner",
            "StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline", "VisualClozeGenerationPipeline",
        ),
        NO_BRANCH,
    ),
    **dict.fromkeys(
        (
            "DreamLitePipeline", "LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL", "OmniGenPipeline",
            "StableDiffusionControlNetPAGPipeline", "StableDiffusionControlNetPAGInpaintPipeline",
            "StableDiffusionXLControlNetPAGPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline", "HunyuanDiTPAGPipeline",
            "KolorsPAGPipeline", "PixArtSigmaPAGPipeline", "SanaPAGPipeline", "StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline",
            "StableDiffusion3PAGImg2ImgPipeline", "AnimateDiffPAGPipeline", "StableDiffusionPAGImg2ImgPipeline",
            "StableDiffusionPAGInpaintPipeline", "StableDiffusionXLPAGPipeline", "StableDiffusionXLPAGImg2ImgPipeline",
            "StableDiffusionXLPAGInpaintPipeline", "StableDiffusionInstructPix2PixPipeline",
            "StableDiffusionXLInstructPix2PixPipeline",
        ),
        THIRD,
    ),
    **dict.fromkeys(
        (
            "AnyFlowFARPipeline", "ChronoEditPipeline", "Cosmos2_5_TransferPipeline", "HeliosPipeline", "HeliosPyramidPipeline",
            "HunyuanVideoFramepackPipeline", "LTXI2VLongMultiPromptPipeline", "StableUnCLIPPipeline", "WanAnimatePipeline",
        ),
        _SECTIONS,
    ),
    **dict.fromkeys(
        (
            "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        _COPIES,
    ),
    **dict.fromkeys(
        (
            "Cosmos3OmniPipeline", "Kandinsky6TI2VAPipeline", "LTX2Pipeline", "LTX2ConditionPipeline", "LTX2HDRPipeline",
            "LTX2InContextPipeline", "LTX2ImageToVideoPipeline",
        ),
        _SEVERAL,
    ),
    **dict.fromkeys(
        ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"), "its loop calls scheduler.step twice a row"
    ),
    **dict.fromkeys(
        (
            "OnnxStableDiffusionPipeline", "OnnxStableDiffusionImg2ImgPipeline", "OnnxStableDiffusionInpaintPipeline",
            "OnnxStableDiffusionUpscalePipeline",
        ),
        "its denoiser does not run in torch",
    ),
    **dict.fromkeys(
        (
            "PRXPixelPipeline", "SanaWMPipeline", "StableDiffusionLatentUpscalePipeline", "Cosmos2_5_PredictBasePipeline",
            "Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline", "HunyuanVideoImageToVideoPipeline", "Ideogram4Pipeline",
            "QwenImage21Pipeline", "ShapEPipeline", "ShapEImg2ImgPipeline", "JoyImageEditPlusPipeline",
        ),
        "how its model's output becomes what the scheduler's step gets is not declared",
    ),
    "DiTPipeline": "its scheduler steps both branches' rows",
    "LuminaPipeline": "it guides three of its four latent channels",
}  # fmt: skip


def reason_against(name: str) -> str:
    """Why the pipeline class of this name is not guarded."""
    return REASONS.get(
        name, "its guidance is not known (family='probe' takes it if its combination is linear in the two branches)"
    )
