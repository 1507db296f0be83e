"""Tiny instances of older transformers: HunyuanDiT, Stable Diffusion 3 with a ControlNet, Stable Cascade's decoder."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.families.more import GUIDED, image_vae, picture
from tests.families.tiny import SQUARE, Tiny, embeds, euler, parts, seeded

_HUNYUAN: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "cross_attention_dim": 16,
    "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 16,
    "hidden_size": 24,
    "text_len": 6,
    "text_len_t5": 8,
}
_SD3: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
}


def _sharp_vae(channels: int = 4) -> Any:
    """Its posterior is all but a point: the ControlNet pipelines draw from it anew for each branch, unguided for one."""
    vae = image_vae(channels)
    torch.nn.init.zeros_(vae.quant_conv.weight[channels:])
    torch.nn.init.constant_(vae.quant_conv.bias[channels:], -30.0)
    return vae


def hunyuan_dit(name: str) -> Any:
    """Four layers: a ControlNet's residuals enter the upper half from the third on."""
    transformer = seeded(lambda: diffusers.HunyuanDiT2DModel(**_HUNYUAN, num_layers=4))
    # the last of its rows is at timestep 1: at 0, a policy that switches there would have switched
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    control = {}
    if "ControlNet" in name:
        net = seeded(lambda: diffusers.HunyuanDiT2DControlNetModel(**_HUNYUAN, transformer_num_layers=4), 1)
        control = {"controlnet": net, "vae": _sharp_vae()}
    kind = getattr(diffusers, name)
    return parts(kind, transformer=transformer, scheduler=scheduler, requires_safety_checker=False, **control)


def sd3_controlnet(name: str) -> Any:
    """Two layers: a ControlNet's residuals do not enter the last."""
    extra = {"extra_conditioning_channels": 1} if "Inpaint" in name else {}
    return parts(
        getattr(diffusers, name),
        transformer=seeded(lambda: diffusers.SD3Transformer2DModel(**_SD3, num_layers=2)),
        controlnet=seeded(lambda: diffusers.SD3ControlNetModel(**_SD3, num_layers=1, **extra), 1),
        vae=_sharp_vae(16),
        scheduler=euler(),
    )


def cascade_decoder() -> Any:
    decoder = seeded(
        lambda: diffusers.models.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            conditioning_dim=16,
            block_out_channels=(16, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_pooled_in_channels=16,
            effnet_in_channels=16,
            dropout=(0.0, 0.0),
            self_attn=False,
            timestep_conditioning_type=("sca",),
        )
    )
    return parts(
        diffusers.StableCascadeDecoderPipeline,
        decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        latent_dim_scale=4.0,
    )


def _two_texts(seed: int) -> dict[str, torch.Tensor]:
    text = embeds(seed, prompt_embeds=(2, 6, 16), prompt_embeds_2=(2, 8, 16))
    masks = {"prompt_attention_mask": torch.ones(2, 6), "prompt_attention_mask_2": torch.ones(2, 8)}
    return {**text, **masks}


_CONTROL = {"control_image": [picture(0), picture(1)]}
_MASK = {"control_mask": [picture(5)] * 2}

TRANSFORMERS: dict[str, Tiny] = {
    f"hunyuan-dit {end or 'text'}".lower(): Tiny(
        lambda end=end: hunyuan_dit(f"HunyuanDiT{end}Pipeline"),
        _two_texts,
        fixed={**SQUARE, "use_resolution_binning": False, **given},
        elements=4 * 4 * 4,
        kept=(0, 4),
        exact=False,
        **GUIDED,
    )
    for end, given in {"": {}, "ControlNet": _CONTROL}.items()
}

TRANSFORMERS |= {
    f"sd3 controlnet {end or 'text'}".lower(): Tiny(
        lambda end=end: sd3_controlnet(f"StableDiffusion3ControlNet{end}Pipeline"),
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16), pooled_prompt_embeds=(2, 16)),
        fixed={**SQUARE, **given},
        elements=16 * 4 * 4,
        exact=False,
        **GUIDED,
    )
    for end, given in {"": _CONTROL, "Inpainting": {**_CONTROL, **_MASK}}.items()
}

TRANSFORMERS["cascade decoder"] = Tiny(
    cascade_decoder,
    # on the negative branch the picture's embeddings are zero
    lambda seed: {
        **embeds(seed, prompt_embeds=(2, 6, 16), prompt_embeds_pooled=(2, 1, 16)),
        "image_embeddings": (seed == 1) * embeds(3, image=(2, 16, 2, 2))["image"],
    },
    shared=("image_embeddings",),
    fixed={"return_dict": True},  # without a dict it returns the images themselves
    elements=4 * 8 * 8,
    counts_steps=False,
    exact=False,
    **GUIDED,
)
