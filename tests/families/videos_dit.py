"""Tiny instances of video transformers that take both branches in one batch."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests import pipelines
from tests.families.more import GUIDED, another, masked, picture
from tests.families.tiny import VIDEO, Tiny, cogvideox, embeds, euler, parts, seeded

FRAMES = [picture(frame) for frame in range(5)]
CLIPS = [FRAMES, [picture(5 + frame) for frame in range(5)]]  # one for each prompt


def cogvideox_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2
        )
    )


def conditioned_cogvideox() -> Any:
    """Its latents and those of a condition, side by side."""
    return cogvideox("CogVideoXDPMScheduler", in_channels=8)().transformer


def consisid() -> Any:
    # Of diffusers' top level it is a part only where OpenCV is installed, which draws a face's key points; no call here does.
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    transformer = seeded(
        lambda: diffusers.ConsisIDTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=8,
            out_channels=4,
            time_embed_dim=2,
            text_embed_dim=16,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            max_text_seq_length=8,
            is_train_face=True,
            cross_attn_interval=1,
            cross_attn_dim_head=2,
            cross_attn_num_heads=2,
            LFE_id_dim=6,
            LFE_vit_dim=4,
            LFE_depth=5,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=1,
            LFE_num_querie=2,
            LFE_output_dim=10,
            LFE_ff_mult=1,
            LFE_num_scale=1,
        )
    )
    scheduler = cogvideox("CogVideoXDPMScheduler")().scheduler
    return parts(ConsisIDPipeline, transformer=transformer, scheduler=scheduler, vae=cogvideox_vae())


def allegro() -> Any:
    transformer = seeded(
        lambda: diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=4,
            sample_height=4,
            sample_frames=2,
            caption_channels=16,
        )
    )
    return parts(
        diffusers.AllegroPipeline, transformer=transformer, scheduler=diffusers.EulerAncestralDiscreteScheduler()
    )


def latte() -> Any:
    transformer = seeded(
        lambda: diffusers.LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            patch_size=2,
            sample_size=4,
            cross_attention_dim=16,
            caption_channels=16,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            video_length=2,
        )
    )
    return parts(diffusers.LattePipeline, transformer=transformer, scheduler=pipelines.ddim())


def easyanimate(name: str = "EasyAnimatePipeline", channels: int = 4, **config: Any) -> Any:
    transformer = seeded(
        lambda: diffusers.EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=channels,
            out_channels=4,
            patch_size=2,
            sample_width=4,
            sample_height=4,
            num_layers=1,
            mmdit_layers=1,
            time_embed_dim=2,
            text_embed_dim=16,
            **config,
        )
    )
    vae = seeded(
        lambda: diffusers.AutoencoderKLMagvit(
            block_out_channels=[4] * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2
        )
    )
    return parts(getattr(diffusers, name), transformer=transformer, vae=vae, scheduler=euler())


def easyanimate_control() -> Any:
    """Its `__call__` names an argument that its `encode_prompt` does not have (diffusers 0.42.1), so that no call of it gets through."""
    pipe = easyanimate("EasyAnimateControlPipeline", 12)
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda text_encoder_index=0, **given: encode(**given)
    return pipe


def clip(seed: int, channels: int = 3) -> torch.Tensor:
    return embeds(seed, clip=(2, channels, 5, 32, 32))["clip"].sigmoid()


_CONDITIONED = {"vae": cogvideox_vae, "transformer": conditioned_cogvideox}
_FACE = {"id_vit_hidden": [embeds(8, hidden=(1, 2, 4))["hidden"]], "id_cond": embeds(9, cond=(1, 6))["cond"]}

DIT: dict[str, Tiny] = {
    "cogvideox i2v": another(
        "cogvideox, dpm", "CogVideoXImageToVideoPipeline", {"image": [picture(), picture(1)]}, parts=_CONDITIONED
    ),
    "cogvideox v2v": another(
        "cogvideox, dpm",
        "CogVideoXVideoToVideoPipeline",
        {"video": CLIPS, "strength": 1.0, "num_frames": None},
        parts={"vae": cogvideox_vae},
    ),
    "cogvideox fun control": another(
        "cogvideox, ddim",
        "CogVideoXFunControlPipeline",
        {"control_video": CLIPS, "num_frames": None},
        parts=_CONDITIONED,
    ),
    "consisid": Tiny(
        consisid,
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 16)),
        fixed={**VIDEO, "image": [picture(), picture(1)], **_FACE},
        elements=4 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "allegro": Tiny(
        allegro,
        lambda seed: masked(seed, 16, dtype=torch.int64),
        fixed={**VIDEO, "num_frames": 8, "negative_prompt": None},
        elements=4 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "latte": Tiny(
        latte,
        lambda seed: embeds(seed, prompt_embeds=(2, 7, 16)),
        fixed={"height": 32, "width": 32, "video_length": 2, "negative_prompt": None, "mask_feature": False},
        elements=4 * 2 * 4 * 4,
        kept=(0, 4),  # without the variance
        exact=False,
        **GUIDED,
    ),
    "easyanimate": Tiny(
        easyanimate,
        lambda seed: masked(seed, 16),
        fixed=VIDEO,
        elements=4 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "easyanimate control": Tiny(
        easyanimate_control,
        lambda seed: masked(seed, 16),
        fixed={**VIDEO, "control_video": clip(0), "ref_image": clip(1)[:, :, :1]},
        elements=4 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
    "easyanimate inpaint": Tiny(
        lambda: easyanimate(
            "EasyAnimateInpaintPipeline", 12, resize_inpaint_mask_directly=False, add_noise_in_inpaint_model=False
        ),
        lambda seed: masked(seed, 16),
        fixed={**VIDEO, "video": clip(0), "mask_video": clip(1, 1)},
        elements=4 * 2 * 4 * 4,
        exact=False,
        **GUIDED,
    ),
}
