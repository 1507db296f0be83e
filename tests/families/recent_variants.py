"""Tiny instances of recent image pipelines that share their parts with one that another module makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers

from tests import pipelines
from tests.families.more import MORE, another, cogview4, image_vae, picture, qwen_vae, small_qwen
from tests.families.tiny import CASES, Tiny, chroma, embeds, euler, parts, seeded, z_image_transformer

TWO = [picture(), picture(1)]
FROM: dict[str, Any] = {"image": TWO, "strength": 1.0}
MASK = picture(5)


def flux_controlnet() -> Any:
    return seeded(
        lambda: diffusers.FluxControlNetModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    )


def qwen_controlnet(extra: int = 0) -> Any:
    return seeded(
        lambda: diffusers.QwenImageControlNetModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            extra_condition_channels=extra,
        )
    )


def z_image_controlnet(channels: int = 16) -> Any:
    return seeded(
        lambda: diffusers.ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=channels,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
    )


def sana_controlnet() -> Any:
    return seeded(
        lambda: diffusers.SanaControlNetModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
        )
    )


def chroma_inpaint() -> Any:
    pipe = chroma()
    pipe.transformer.register_to_config(guidance_embeds=False)  # asked for, and only in the files of checkpoints
    return parts(
        diffusers.ChromaInpaintPipeline, transformer=pipe.transformer, scheduler=pipe.scheduler, vae=image_vae()
    )


def sana_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderDC(
            latent_channels=4,
            encoder_block_out_channels=(4,) * 6,
            decoder_block_out_channels=(4,) * 6,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6,
            attention_head_dim=4,
        )
    )


def z_image_omni() -> Any:
    pipe = parts(
        diffusers.ZImageOmniPipeline,
        transformer=z_image_transformer(siglip_feat_dim=8),
        scheduler=euler(),
        vae=image_vae(16).bfloat16(),  # it gives the autoencoder bfloat16, whatever its dtype
    )
    seen = embeds(9, seen=(2, 2, 8))["seen"]
    pipe.prepare_siglip_embeds = lambda images, batch_size, **_: [[seen] * len(images) for _ in range(batch_size)]
    return pipe


def omni_prompt(seed: int) -> dict[str, Any]:
    """Three pieces of text a prompt: around the picture, and after the place of the new one."""
    pieces = embeds(seed, first=(2, 3, 16), second=(2, 4 + seed, 16), third=(2, 2, 16)).values()
    return {"prompt_embeds": [list(image) for image in zip(*pieces, strict=True)]}


QWEN_CONTROL: dict[str, Any] = {"control_image": TWO, "controlnet_conditioning_scale": 0.5}
QWEN_BESIDES = {"controlnet": ("encoder_hidden_states", "encoder_hidden_states_mask")}

VARIANTS: dict[str, Tiny] = {
    "chroma inpaint": dataclasses.replace(
        CASES["chroma"],
        make=chroma_inpaint,
        fixed={**CASES["chroma"].fixed, **FROM, "mask_image": [MASK] * 2},
    ),
    "cogview 4 control": dataclasses.replace(
        MORE["cogview 4"],
        make=lambda: cogview4("CogView4ControlPipeline", channels=8, vae=image_vae()),
        fixed={**MORE["cogview 4"].fixed, "control_image": TWO},
    ),
    "flux controlnet": another(
        "flux",
        "FluxControlNetPipeline",
        {"control_image": TWO},
        parts={"vae": image_vae, "controlnet": flux_controlnet},
        besides={"controlnet": ("encoder_hidden_states", "pooled_projections")},
    ),
    "qwen controlnet": another(
        "qwen",
        "QwenImageControlNetPipeline",
        QWEN_CONTROL,
        parts={"vae": qwen_vae, "controlnet": qwen_controlnet},
        besides=QWEN_BESIDES,
    ),
    "qwen controlnet inpaint": another(
        "qwen",
        "QwenImageControlNetInpaintPipeline",
        {**QWEN_CONTROL, "control_mask": [MASK] * 2},
        parts={"vae": qwen_vae, "controlnet": lambda: qwen_controlnet(extra=4)},
        besides=QWEN_BESIDES,
    ),
    "qwen edit inpaint": dataclasses.replace(
        MORE["qwen edit"],
        make=small_qwen("QwenImageEditInpaintPipeline"),
        fixed={**MORE["qwen edit"].fixed, **FROM, "mask_image": [MASK] * 2},
    ),
    "qwen layered": dataclasses.replace(
        MORE["qwen edit plus"],
        make=small_qwen(
            "QwenImageLayeredPipeline",
            config={"use_additional_t_cond": True, "use_layer3d_rope": True},
            text_encoder=pipelines.text_encoder,  # asked for its dtype
        ),
        # no latents come out of it, and of two prompts it mixes up the images
        fixed={"image": picture(), "prompt": "a", "layers": 1, "cfg_normalize": True, "output_type": "pt"},
        elements=8 * 16,
        kept=(0, 8),
    ),
    "sana controlnet": dataclasses.replace(
        another("sana", "SanaControlNetPipeline", parts={"vae": sana_vae, "controlnet": sana_controlnet}),
        fixed={**CASES["sana"].fixed, "control_image": TWO},
    ),
    "z-image inpaint": another(
        "z-image",
        "ZImageInpaintPipeline",
        {**FROM, "mask_image": [MASK] * 2},
        parts={"vae": lambda: image_vae(16)},
    ),
    "z-image controlnet": another(
        "z-image",
        "ZImageControlNetPipeline",
        {"control_image": TWO},
        parts={"vae": lambda: image_vae(16), "controlnet": z_image_controlnet},
    ),
    "z-image controlnet inpaint": another(
        "z-image",
        "ZImageControlNetInpaintPipeline",
        {"control_image": TWO, "image": TWO, "mask_image": [MASK] * 2},
        parts={"vae": lambda: image_vae(16), "controlnet": lambda: z_image_controlnet(33)},
    ),
    "z-image omni": dataclasses.replace(
        CASES["z-image"],
        make=z_image_omni,
        branch=omni_prompt,
        fixed={**CASES["z-image"].fixed, "image": picture(size=64)},  # the smallest that it takes
    ),
}
