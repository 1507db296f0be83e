"""What the guard has to know about a pipeline class, as data."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Arguments = Mapping[str, Any]
ToStep = Callable[[Any, torch.Tensor, Mapping[str, Any]], torch.Tensor]


def _unpacked_video(pipe: Any, output: torch.Tensor, given: Any) -> torch.Tensor:
    """Tokens to [B, C, F, H, W] without the first frame, which is the user's."""
    size = (given[name] for name in ("num_frames", "height", "width"))
    patches = pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    return pipe._unpack_latents(output, *size, *patches)[:, :, 1:]


TO_STEP: dict[str, ToStep] = {
    "one frame": lambda pipe, output, given: output.squeeze(2),
    "after the first frame, dimension 1": lambda pipe, output, given: output[:, 1:],  # the first is the user's
    "after the first frame, dimension 2": lambda pipe, output, given: output[:, :, 1:],
    "unpacked, after the first frame": _unpacked_video,
}


def parts_of(pipe: Any, names: Iterable[str]) -> dict[str, Any]:
    """The components that the pipeline has under these names."""
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Pipeline classes whose loops collect and combine the two branches alike.

    pipelines: class names in diffusers.
    denoisers: the components that the loop calls; absent ones (None) are left out.
    calls: denoiser calls a row: 1 (a batch or list of both branches) or 2.
    order: the branches in the order in which they lie in the batch, or are called.
    sign: of the model's output in what `scheduler.step` gets.
    to_step: (pipe, output, arguments of the denoiser's call) -> the output in the step's space, where that is not the output
        itself cut to as many channels (or tokens: dimension 1) as the step's sample has.
    scale: the argument that holds the guidance scale s; of each denoiser, where they differ (`scales`).
    live: whether the loop reads the scale from the pipeline at every row, where a callback can change it.
    offset: the effective scale, g in u + g (c - u), is s + offset.
    norm: the dimension along which the combination gets another norm than u + g (c - u) has, where it does.
    nonlinear: what the family does besides, where its combination is not u + g (c - u); unguarded images keep it.
    before_loop: whether the denoiser is called before the loop, too, where its outputs are nobody's (GLM-Image reads its pictures).
    by_sign: whether a probe tells order and sign alone in a row that is not linear: its parts have scales of their own.
    skippable: whether a call whose branch no image needs may be left out (not with GLM-Image's own key and value caches).
    second_branch: what the caller must pass so that the second branch runs.
    refused_if: flags of the pipeline or its configuration with which it cannot be guarded, and why.
    """

    name: str
    pipelines: tuple[str, ...]
    denoisers: tuple[str, ...] = ("transformer",)
    calls: int = 1
    order: tuple[str, str] = ("uncond", "cond")
    sign: int = 1
    to_step: ToStep | None = None
    scale: str = "guidance_scale"
    scales: Mapping[str, str] | None = None
    live: bool = False
    offset: float = 0.0
    norm: int | None = None
    nonlinear: str | None = None
    before_loop: bool = False
    by_sign: bool = False
    skippable: bool = True
    second_branch: str = "pass guidance_scale above 1"
    refused_if: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str) -> tuple[Any, ...]:
        """The families of a file beside this one: fields by the family's name; functions by theirs in TO_STEP."""
        found = []
        for name, facts in json.loads(Path(__file__).with_name(file).read_text()).items():
            if "to_step" in facts:
                facts["to_step"] = TO_STEP[facts["to_step"]]
            tuples = {key: tuple(value) for key, value in facts.items() if isinstance(value, list)}
            found.append(cls(name=name, **facts | tuples))
        return tuple(found)

    def refusal(self, pipe: Any, arguments: Arguments) -> str | None:
        """Why this call cannot be guarded although the class can; names the argument."""
        for flag, why in self.refused_if.items():
            if pipe.config[flag] if flag in pipe.config else getattr(pipe, flag, False):
                return why.format(pipeline=type(pipe).__name__)
        return None

    def guidance_scale(self, pipe: Any, arguments: Arguments, denoiser: str) -> float:
        """g of u + g (c - u), for rows that `denoiser` runs, right now."""
        name = self.scale if self.scales is None else self.scales[denoiser]
        value = getattr(pipe, "_" + name, None) if self.live else arguments.get(name)
        if value is None:
            value = arguments[self.scale]
        return float(value) + self.offset

    def given(self, pipe: Any, arguments: Arguments) -> str:
        """What decides whether the second branch runs, for messages."""
        return f"{self.scale}={arguments.get(self.scale)!r}"

    def in_probe(self, pipe: Any) -> dict[str, Any]:
        """Components that a probe of the loop puts in place of the pipeline's."""
        return {}

    def in_step(self, pipe: Any, result: Any, sample: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """The tensor (or list of one per row) in what a denoiser returned, in the space of `scheduler.step`, whose sample (of one branch)
        is `sample`."""
        # diffusers' outputs are dicts whose first item is [0]
        output = result[0] if isinstance(result, (tuple, dict)) else getattr(result, "sample", result)
        if isinstance(output, (list, tuple)):
            output = torch.stack(list(output))
        if self.to_step is not None:
            output = self.to_step(pipe, output, given)
        elif output.ndim > 1 and output.shape[1] > sample.shape[1]:
            output = output[:, : sample.shape[1]]
        return -output if self.sign < 0 else output
