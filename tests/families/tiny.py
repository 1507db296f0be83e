"""Tiny random instances of the pipelines that combine their branches themselves: no text encoder, embeddings are passed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch


@dataclass(frozen=True)
class Tiny:
    """One pipeline class with the arguments of a call for two images.

    make: the pipeline.
    branch: seed -> the embeddings of one branch; those of the other have the same names after "negative_".
    on, off: the arguments with which the second branch runs, and does not.
    fixed: the other arguments; images: how many come of a call.
    elements: of one image's latent at scheduler.step; kept: what of the denoiser's output reaches it, in dimension `along`.
    counts_steps: whether its scheduler's timesteps are training steps, in which t_star counts.
    bends: whether its combination is not linear in the two branches; told: the wrong declarations that a probe tells.
    full_rows: rows that run both branches where only one is needed: the first of each denoiser.
    wide: components that stay in float32 where the others are narrow.
    exact: whether one branch alone has the bits that it has in a batch of both.
    no_negative: why no call of stock runs on the negative branch alone, where none does (`negative_alone`); uncond_half: then, which half
        of a batch is the negative branch's.
    besides: by component, the arguments that differ between the negative branch's call and a call on the negative prompt alone: a
        controlnet may see the prompt in both branches.
    """

    make: Callable[[], Any]
    branch: Callable[[int], dict[str, Any]]
    on: dict[str, Any]
    off: dict[str, Any]
    elements: int
    fixed: dict[str, Any] = field(default_factory=dict)
    bends: bool = False
    told: tuple[str, ...] = ("order", "sign", "offset", "tokens")
    exact: bool = True
    steps: int = 4
    full_rows: int = 1
    images: int = 2
    counts_steps: bool = True
    kept: tuple[int, int | None] = (0, None)
    no_negative: str = ""
    uncond_half: int = 0
    besides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    along: int = 1
    wide: tuple[str, ...] = ()

    def guided(self, **changes: Any) -> dict[str, Any]:
        negative = {f"negative_{name}": value for name, value in self.branch(2).items() if name not in self.shared}
        return {**self.fixed, **self.branch(1), **negative, **self.on, **changes}

    def alone(self, seed: int, **changes: Any) -> dict[str, Any]:
        """The arguments of a stock call with guidance off: branch 1 is the prompt, 2 the negative prompt."""
        return {**self.fixed, **self.branch(seed), **self.off, **changes}

    def generators(self, *seeds: int) -> Any:
        """One for each image; where one image comes of a call, the generator itself: some pipelines take no list."""
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        return made if self.images > 1 else made[0]

    shared: tuple[str, ...] = ()  # embeddings without a negative


def run(tiny: Tiny, pipe: Any, arguments: dict[str, Any], **changes: Any) -> torch.Tensor:
    torch.manual_seed(0)  # some pipelines encode a picture without the generator that they are given
    given = {
        "num_inference_steps": tiny.steps,
        "output_type": "latent",
        "return_dict": False,
        "generator": tiny.generators(5, 6),
        **arguments,
        **changes,
    }
    found = pipe(**given)[0]
    return torch.cat(found) if isinstance(found, list) else found


def negative_alone(tiny: Tiny, pipe: Any) -> torch.Tensor:
    """Stock on the negative prompt, with what is given `besides` it in a guided call."""
    if tiny.no_negative:
        return _unconditional_twice(tiny, pipe)
    if not tiny.besides:
        return run(tiny, pipe, tiny.alone(2))
    seen: dict[str, dict[str, Any]] = {}

    def looks(part: str, module: Any, args: Any, given: dict[str, Any]) -> None:
        seen[part] = {name: given[name] for name in tiny.besides[part]}  # the last call is the negative branch's

    def replaces(part: str, module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, **seen[part]}

    found = None
    for hook, arguments in ((looks, tiny.guided()), (replaces, tiny.alone(2))):
        with contextlib.ExitStack() as stack:
            for part in tiny.besides:
                handle = getattr(pipe, part).register_forward_pre_hook(functools.partial(hook, part), with_kwargs=True)
                stack.callback(handle.remove)
            found = run(tiny, pipe, arguments)
    return found


def _unconditional_twice(tiny: Tiny, pipe: Any) -> torch.Tensor:
    """Stock's guided call with u in the place of c, so that e = u."""

    def twice(module: Any, given: Any, output: Any) -> Any:
        u = output[0].chunk(2)[tiny.uncond_half]
        both = torch.cat([u, u])
        return type(output)(sample=both) if isinstance(output, dict) else (both, *output[1:])

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    hook = denoiser.register_forward_hook(twice)
    try:
        return run(tiny, pipe, tiny.guided())
    finally:
        hook.remove()


def seeded(make: Callable[[], torch.nn.Module], seed: int = 0) -> Any:
    """The module with random weights everywhere: layers that begin at zero would hide what they see."""
    torch.manual_seed(seed)
    with torch.no_grad():  # a weight that is made of a direction and a norm is then copied as the others are
        module = make().eval()
    for parameter in module.parameters():
        if not parameter.any() or (parameter == 1).all():
            torch.nn.init.normal_(parameter, mean=parameter.flatten()[0].item(), std=0.1)
    return module


def embeds(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **config})


def parts(kind: Any, **given: Any) -> Any:
    """The pipeline of class `kind` with the given parts, the others None."""
    import inspect

    names = [
        name
        for name, p in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and p.default is p.empty
    ]
    return quiet(kind(**{**dict.fromkeys(names), **given}))


def flux_transformer(**config: Any) -> Any:
    return seeded(
        lambda: diffusers.FluxTransformer2DModel(
            **{
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (4, 4, 8),
                **config,
            }
        )
    )


def flux(name: str = "FluxPipeline", **extra: Any) -> Callable[[], Any]:
    return lambda: parts(
        getattr(diffusers, name),
        transformer=flux_transformer(),
        scheduler=euler(),
        **{k: v() for k, v in extra.items()},
    )


def qwen(name: str = "QwenImagePipeline", config: Any = None, **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = seeded(
            lambda: diffusers.QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(8, 4, 4),
                **(config or {}),
            )
        )
        return parts(
            getattr(diffusers, name), transformer=transformer, scheduler=euler(), **{k: v() for k, v in extra.items()}
        )

    return make


def wan_transformer(seed: int = 0, **config: Any) -> Any:
    return seeded(
        lambda: diffusers.WanTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 32,
                "freq_dim": 32,
                "ffn_dim": 32,
                "num_layers": 1,
                "rope_max_seq_len": 32,
                **config,
            }
        ),
        seed,
    )


def wan(name: str = "WanPipeline", *, boundary: float | None = None, scheduler: Any = euler, **config: Any) -> Any:
    def make() -> Any:
        extra = {"transformer_2": wan_transformer(1, **config), "boundary_ratio": boundary} if boundary else {}
        return parts(getattr(diffusers, name), transformer=wan_transformer(**config), scheduler=scheduler(), **extra)

    return make


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def z_image_transformer(**config: Any) -> Any:
    return seeded(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
            **config,
        )
    )


def z_image() -> Any:
    return parts(diffusers.ZImagePipeline, transformer=z_image_transformer(), scheduler=euler())


def klein() -> Any:
    transformer = seeded(
        lambda: diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
    )
    vae = diffusers.AutoencoderKLFlux2(  # read for its latents' statistics even where latents are returned
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=32,
    )
    return parts(diffusers.Flux2KleinPipeline, transformer=transformer, scheduler=euler(), vae=vae.eval())


def chroma() -> Any:
    transformer = seeded(
        lambda: diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
    )
    return parts(diffusers.ChromaPipeline, transformer=transformer, scheduler=euler())


def sana() -> Any:
    transformer = seeded(
        lambda: diffusers.SanaTransformer2DModel(
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
    return parts(
        diffusers.SanaPipeline, transformer=transformer, scheduler=diffusers.DPMSolverMultistepScheduler(flow_shift=3.0)
    )


def ltx(name: str = "LTXPipeline", **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = seeded(
            lambda: diffusers.LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=8,
                cross_attention_dim=16,
                num_layers=1,
                caption_channels=16,
            )
        )
        return parts(
            getattr(diffusers, name), transformer=transformer, scheduler=euler(), **{k: v() for k, v in extra.items()}
        )

    return make


def cogvideox(scheduler: str, **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        transformer = seeded(
            lambda: diffusers.CogVideoXTransformer3DModel(
                **{"in_channels": 4, **config},
                num_attention_heads=2,
                attention_head_dim=8,
                out_channels=4,
                time_embed_dim=2,
                text_embed_dim=16,
                num_layers=1,
                sample_width=4,
                sample_height=4,
                sample_frames=9,
                patch_size=2,
                temporal_compression_ratio=4,
                max_text_seq_length=8,
            )
        )
        made = getattr(diffusers, scheduler)(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
        return parts(diffusers.CogVideoXPipeline, transformer=transformer, scheduler=made)

    return make


def auraflow() -> Any:
    transformer = seeded(
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            out_channels=4,
            pos_embed_max_size=64,
        )
    )
    return parts(diffusers.AuraFlowPipeline, transformer=transformer, scheduler=euler())


SQUARE = {"height": 32, "width": 32}
VIDEO = {"height": 32, "width": 32, "num_frames": 5}


def _masked(seed: int, width: int, length: int = 7, mask: str = "prompt_attention_mask", dtype: Any = None) -> dict:
    ones = torch.ones(2, length, dtype=dtype or torch.float32)
    return {**embeds(seed, prompt_embeds=(2, length, width)), mask: ones}


CASES: dict[str, Tiny] = {
    "flux": Tiny(
        flux(),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32), pooled_prompt_embeds=(2, 32)),
        on={"true_cfg_scale": 4.0},
        off={"true_cfg_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "qwen": Tiny(
        qwen(),
        lambda seed: _masked(seed, 16, length=5 + seed, mask="prompt_embeds_mask", dtype=torch.int64),
        on={"true_cfg_scale": 4.0},
        off={"true_cfg_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
        bends=True,
    ),
    "wan": Tiny(
        wan(),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=VIDEO,
        elements=16 * 2 * 4 * 4,
    ),
    "wan 2.2": Tiny(
        wan(boundary=0.875, scheduler=unipc),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 32)),
        on={"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        off={"guidance_scale": 1.0},
        fixed=VIDEO,
        elements=16 * 2 * 4 * 4,
        full_rows=2,
    ),
    "z-image": Tiny(
        z_image,
        lambda seed: {"prompt_embeds": list(embeds(seed, prompt_embeds=(2, 5 + seed, 16))["prompt_embeds"])},
        on={"guidance_scale": 3.0},
        off={"guidance_scale": 0.0},
        fixed=SQUARE,
        elements=16 * 4 * 4,
        exact=False,
    ),
    "klein": Tiny(
        klein,
        lambda seed: embeds(seed, prompt_embeds=(2, 6, 16)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "chroma": Tiny(
        chroma,
        lambda seed: _masked(seed, 32),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 16,
    ),
    "sana": Tiny(
        sana,
        lambda seed: _masked(seed, 8),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 64, "width": 64, "use_resolution_binning": False, "negative_prompt": None},
        elements=4 * 2 * 2,
        exact=False,
    ),
    "ltx": Tiny(
        ltx(),
        lambda seed: _masked(seed, 16, dtype=torch.int64),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 64, "width": 64, "num_frames": 9},
        elements=8 * 2 * 2 * 2,
        exact=False,
    ),
    "cogvideox, ddim": Tiny(
        cogvideox("CogVideoXDDIMScheduler"),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 16)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 32, "width": 32, "num_frames": 5},
        elements=4 * 2 * 4 * 4,
        exact=False,
    ),
    "cogvideox, dpm": Tiny(
        cogvideox("CogVideoXDPMScheduler"),
        lambda seed: embeds(seed, prompt_embeds=(2, 8, 16)),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed={"height": 32, "width": 32, "num_frames": 5},
        elements=4 * 2 * 4 * 4,
        exact=False,
    ),
    "auraflow": Tiny(
        auraflow,
        lambda seed: _masked(seed, 16),
        on={"guidance_scale": 4.0},
        off={"guidance_scale": 1.0},
        fixed=SQUARE,
        elements=4 * 4 * 4,
        exact=False,
    ),
}
