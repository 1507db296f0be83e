"""Tiny instances of video pipelines that flow, most in two calls: Wan's relatives, Sana video, Kandinsky 5, AnyFlow."""

from __future__ import annotations

from typing import Any

import diffusers

from tests.families.more import GUIDED, another, masked, picture, wan_vae
from tests.families.recent_single import kandinsky5, kandinsky5_prompt
from tests.families.tiny import VIDEO, Tiny, embeds, euler, parts, seeded, unipc, wan_transformer
from tests.families.videos_dit import CLIPS, FRAMES

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def vace_transformer() -> Any:
    return seeded(lambda: diffusers.WanVACETransformer3DModel(vace_layers=[0], vace_in_channels=2 * 16 + 64, **WAN))


def skyreels_i2v() -> Any:
    transformer = seeded(
        lambda: diffusers.SkyReelsV2Transformer3DModel(
            in_channels=2 * 16 + 4, out_channels=16, image_dim=8, added_kv_proj_dim=24, **WAN
        )
    )
    pipe = parts(diffusers.SkyReelsV2ImageToVideoPipeline, transformer=transformer, scheduler=unipc(), vae=wan_vae())
    image_embeds = embeds(9, image_embeds=(1, 5, 8))["image_embeds"]
    pipe.encode_image = lambda *_: image_embeds
    return pipe


def anyflow() -> Any:
    transformer = seeded(lambda: diffusers.AnyFlowTransformer3DModel(**WAN))
    return parts(
        diffusers.AnyFlowPipeline, transformer=transformer, scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
    )


def sana_video(name: str = "SanaVideoPipeline", scheduler: Any = None) -> Any:
    transformer = seeded(
        lambda: diffusers.SanaVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=8,
            sample_size=4,
            rope_max_seq_len=32,
        )
    )
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return parts(getattr(diffusers, name), transformer=transformer, scheduler=scheduler, vae=wan_vae())


def kandinsky5_i2v() -> Any:
    """Without what it does after the loop: its first frames take mean and deviation of the whole batch's others (and five frames at least)."""
    pipe = kandinsky5("Kandinsky5I2VPipeline", vae=hunyuan_vae())
    pipe.normalize_first_frame = lambda latents: latents
    return pipe


def hunyuan_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
        )
    )


def skyreels_hunyuan_transformer() -> Any:
    return seeded(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=8,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
        )
    )


_TWO = [picture(), picture(1)]
_SANA = {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False, "negative_prompt": None}

FLOW: dict[str, Tiny] = {
    "wan vace": another(
        "wan",
        "WanVACEPipeline",
        {"video": FRAMES, "mask": [picture(20 + frame) for frame in range(5)], "reference_images": [picture(30)]},
        parts={"vae": wan_vae, "transformer": vace_transformer},
        branch=lambda seed: embeds(seed, prompt_embeds=(1, 8, 32)),
        elements=16 * 3 * 4 * 4,  # with a frame for the reference
        images=1,
    ),
    "lucy edit": another(
        "wan",
        "LucyEditPipeline",
        {"video": CLIPS},
        wide=("vae",),  # to which the pipeline gives float32
        parts={"vae": wan_vae, "transformer": lambda: wan_transformer(in_channels=32)},
    ),
    "skyreels i2v": Tiny(
        skyreels_i2v,
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        fixed={**VIDEO, "image": picture()},
        elements=16 * 2 * 4 * 4,
        **GUIDED,
    ),
    "anyflow": Tiny(
        anyflow,
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        fixed=VIDEO,
        elements=16 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "sana video": Tiny(
        sana_video,
        lambda seed: masked(seed, 8),
        fixed=_SANA,
        elements=16 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "sana i2v": Tiny(
        lambda: sana_video("SanaImageToVideoPipeline", euler()),
        lambda seed: masked(seed, 8),
        fixed={**_SANA, "image": picture()},
        elements=16 * 1 * 4 * 4,
        kept=(1, None),  # without the first frame
        along=2,
        exact=False,
        **GUIDED,
    ),
    "kandinsky 5 t2v": Tiny(
        lambda: kandinsky5("Kandinsky5T2VPipeline"),
        kandinsky5_prompt,
        fixed=VIDEO,
        elements=4 * 2 * 4 * 4,
        exact=False,  # u + 1 (c - u) of its first row is c but for the last bit
        **GUIDED,
    ),
    "kandinsky 5 i2v": Tiny(
        kandinsky5_i2v,
        kandinsky5_prompt,
        fixed={**VIDEO, "image": _TWO},
        elements=4 * 1 * 4 * 4,
        kept=(1, None),  # without the first frame
        exact=False,
        **GUIDED,
    ),
    "hunyuan skyreels": another(
        "hunyuan video",
        "HunyuanSkyreelsImageToVideoPipeline",
        {"image": _TWO},
        parts={"vae": hunyuan_vae, "transformer": skyreels_hunyuan_transformer},
    ),
}
