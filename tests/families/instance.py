"""A tiny random instance of a pipeline class, and what it is built with."""

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
