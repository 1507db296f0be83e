"""The parts of the pipeline, untrained: tokenizer, text encoder, autoencoder, UNet, scheduler.

Shapes: pictures [B, 3, 32, 32] in -1..1, latents [B, 8, 8, 8] of unit variance, text [B, 16, 128].
"""

from __future__ import annotations

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastguard.testbed import path

LENGTH = 16  # tokens a prompt
WIDTH = 128  # text features
LATENT_CHANNELS = 8
LATENT_SIDE = 8


def tokenizer() -> CLIPTokenizer:
    """The committed tokenizer: byte-level BPE in CLIP's format, 1,280 tokens, learned once from the captions.

    Learning it anew gives other numbers to the same tokens each time (the `tokenizers` library goes through a hash map), so that
    two processes, or a resumed run, would not mean the same by them.
    """
    return CLIPTokenizer.from_pretrained(path() / "tokenizer")


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of CLIP's text transformer; trained together with the UNet."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae(width: int = 48) -> AutoencoderTiny:
    """A fourfold autoencoder, 32x32x3 -> 8x8x8.

    He's initialisation, every residual block starting close to the identity: with PyTorch's own the
    signal shrinks from layer to layer and training stays at 14 dB (the mean colours) for long.
    """
    vae = AutoencoderTiny(
        encoder_block_out_channels=(width, width, width),
        decoder_block_out_channels=(width, width, width),
        num_encoder_blocks=(0, 2, 2),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in vae.modules():
        if isinstance(layer, AutoencoderTinyBlock):
            layer.conv[-1].weight.data.mul_(0.1)
    vae.decoder.layers[-1].weight.data.mul_(0.3)
    nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)  # mid-grey in 0..1
    return vae


def make_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet with two levels of 64 and 128 channels, cross-attention in both."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, predicting epsilon."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
