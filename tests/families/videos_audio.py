"""Tiny instances of pipelines that make sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from tests import pipelines
from tests.families.more import GUIDED
from tests.families.tiny import Tiny, embeds, euler, parts, seeded


def texts() -> dict[str, Any]:
    return {"tokenizer": pipelines.tokenizer(), "text_encoder": pipelines.text_encoder()}


def oobleck() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            sampling_rate=4,
        )
    )


def stable_audio() -> Any:
    transformer = seeded(
        lambda: diffusers.StableAudioDiTModel(
            sample_size=8,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=4,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        )
    )
    projection = seeded(
        lambda: diffusers.StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=8)
    )
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    return parts(
        diffusers.StableAudioPipeline,
        transformer=transformer,
        projection_model=projection,
        scheduler=scheduler,
        vae=oobleck(),
    )


def stable_audio_3() -> Any:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    transformer = seeded(
        lambda: diffusers.StableAudio3DiTModel(
            io_channels=4,
            embed_dim=16,
            depth=1,
            num_heads=2,
            cond_token_dim=8,
            global_cond_dim=8,
            local_add_cond_dim=5,
            timestep_features_dim=8,
            ff_mult=1.0,
            num_memory_tokens=2,
        )
    )
    vae = seeded(
        lambda: diffusers.AutoencoderSAME(
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=(1,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=4,
            dim_heads=4,
            sampling_rate=4,
        )
    )
    return parts(
        diffusers.StableAudio3Pipeline,
        transformer=transformer,
        duration_embedder=seeded(lambda: StableAudio3DurationEmbedder(output_dim=8, fourier_dim=8)),
        scheduler=euler(shift=1.0, stochastic_sampling=False),
        vae=vae,
    )


def audioldm2() -> Any:
    unet = seeded(
        lambda: diffusers.AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=((None, 8, 16), (None, 8, 16)),
            attention_head_dim=2,
        )
    )
    text = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    language = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=16, sampling_rate=8, upsample_initial_channel=4, upsample_rates=[2], upsample_kernel_sizes=[2],
        resblock_kernel_sizes=[1], resblock_dilation_sizes=[[1]],
    )  # fmt: skip
    return parts(
        diffusers.AudioLDM2Pipeline,
        unet=unet,
        vae=pipelines.vae(),
        text_encoder_2=transformers.T5EncoderModel(text).eval(),  # asked for their dtype and kind
        language_model=transformers.GPT2LMHeadModel(language).eval(),
        vocoder=transformers.SpeechT5HifiGan(vocoder).eval(),
        scheduler=pipelines.ddim(),
    )


def longcat_audio() -> Any:
    transformer = seeded(
        lambda: diffusers.LongCatAudioDiTTransformer(
            dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=4
        )
    )
    vae = seeded(
        lambda: diffusers.LongCatAudioDiTVae(
            channels=4,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=4,
            encoder_latent_dim=8,
            downsampling_ratio=2,
            sample_rate=8,
        )
    )
    scheduler = euler(shift=1.0, invert_sigmas=True)
    return parts(diffusers.LongCatAudioDiTPipeline, transformer=transformer, vae=vae, scheduler=scheduler, **texts())


def ace_step() -> Any:
    transformer = seeded(
        lambda: diffusers.AceStepTransformer1DModel(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=8,
        )
    )
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepConditionEncoder

    sizes = {"num_lyric_encoder_hidden_layers": 1, "num_timbre_encoder_hidden_layers": 1, "num_attention_heads": 2}
    condition = seeded(
        lambda: AceStepConditionEncoder(
            hidden_size=16,
            intermediate_size=16,
            text_hidden_dim=32,
            timbre_hidden_dim=4,
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=8,
            **sizes,
        )
    )
    return parts(
        diffusers.AceStepPipeline,
        transformer=transformer,
        condition_encoder=condition,
        vae=oobleck(),
        scheduler=euler(num_train_timesteps=1, shift=1.0),
        **texts(),
    )


AUDIO: dict[str, Tiny] = {
    "stable audio": Tiny(
        stable_audio,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 8)),
        elements=4 * 8,
        exact=False,
        counts_steps=False,
        **GUIDED,
    ),
    "stable audio 3": Tiny(
        stable_audio_3,
        lambda seed: {
            **embeds(seed, prompt_embeds=(2, 6, 8)),
            "encoder_attention_mask": torch.ones(2, 6, dtype=torch.int64),
        },
        fixed={"duration": 8.0},
        elements=4 * 8,
        exact=False,
        **GUIDED,
    ),
    "audioldm 2": Tiny(
        audioldm2,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16), generated_prompt_embeds=(2, 4, 8)),
        fixed={"audio_length_in_s": 4.0},
        elements=4 * 8 * 8,
        exact=False,
        **GUIDED,
    ),
    "longcat audio": Tiny(
        longcat_audio,
        lambda seed: {"prompt": ["ab", "cd"] if seed == 1 else ["ef", "gh"]},
        fixed={"audio_duration_s": 2.0},
        elements=8 * 4,
        counts_steps=False,
        full_rows=4,  # no policy without a limit leaves a call out
        **GUIDED,
    ),
    "ace-step": Tiny(
        ace_step,
        lambda seed: {"prompt": ["a", "ab"]},
        fixed={"audio_duration": 4.0, "lyrics": ["la", "lo"], "max_text_length": 16, "max_lyric_length": 16},
        shared=("prompt",),
        elements=8 * 4,
        bends=True,
        told=("order", "sign"),
        exact=False,
        counts_steps=False,
        no_negative="the negative branch is a parameter of the model",
        uncond_half=1,
        **GUIDED,
    ),
}
