"""The arguments of `python -m bench paper`, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.paper.inputs import BadInput
from bench.paper.work import Amount
from fastguard.pipelines import loading


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of the command, see `python -m bench paper --help`."""

    out: Path
    amount: Amount
    model: str | None = None
    lora: Path | None = None
    prompts: Path | None = None
    ordinary: Path | None = None
    train_images: Path | None = None
    limit: int | None = None
    methods: Sequence[str] | None = None
    steps: int = 50
    gate: float | None = None
    policy: Path | None = None
    sscd: str = "auto"
    clip: str | None = None
    fid: str | None = None
    real_images: Path | None = None
    seconds: int = 0
    device: str = "auto"
    dtype: str = "auto"
    scheduler: str | None = None
    processes: int = 1
    scenario: bool = False
    dry: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        """BadInput for arguments that do not go together or are out of range."""
        problems = []
        if (self.model is None) != (self.prompts is None) and not self.scenario:
            problems.append(
                "--model and --prompts go together; without both the embedded model and its test prompts are used"
            )
        if self.prompts is not None and self.train_images is None:
            problems.append("--train-images: is needed with --prompts")
        if self.prompts is None and (self.train_images or self.ordinary):
            problems.append("--train-images, --ordinary: need --prompts")
        if self.real_images is not None and self.fid is None:
            problems.append("--real-images: is for --fid, which is not given")
        a = self.amount
        for name, value, low in (
            ("seeds", a.seeds, 1),
            ("ordinary-seeds", a.ordinary, 0),
            ("detection-seeds", a.detection, 0),
            ("batch-size", a.batch, 1),
            ("steps", self.steps, 1),
            ("processes", self.processes, 1),
            ("seconds", self.seconds, 0),
            ("limit", 1 if self.limit is None else self.limit, 1),
        ):
            if value < low:
                problems.append(f"--{name}={value}: must be at least {low}")
        for scale in (a.scale, *a.scales):
            if not 1 < scale < float("inf"):
                problems.append(f"guidance scale {scale}: must be above 1 and finite")
        if self.gate is not None and not 0 < self.gate < float("inf"):
            problems.append(f"--gate={self.gate}: must be above 0 and finite")
        if problems:
            raise BadInput("arguments", problems)

    @property
    def embedded(self) -> bool:
        """The embedded model, or one fine-tuned from it, with its own prompts and measures."""
        return self.model is None or self.scenario

    def load(self, device: str, dtype: str) -> Any:
        """The pipeline, with its LoRA. ValueError or OSError if it cannot be had."""
        pipe = loading.load_pipeline(
            self.model or loading.TESTBED, dtype=dtype, device=device, scheduler=self.scheduler
        )
        if self.lora is not None:
            try:
                pipe.load_lora_weights(self.lora)
            except (AttributeError, ValueError, OSError, KeyError, ImportError) as error:
                raise BadInput(f"lora={str(self.lora)!r}", [str(error).splitlines()[0]]) from None
        return pipe

    @property
    def sscd_name(self) -> str:
        """ "auto" resolved."""
        return self.sscd if self.sscd != "auto" else "off" if self.embedded else "onnx"
