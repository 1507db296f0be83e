"""Stock diffusers, as it is and with a compiled UNet."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import torch

from bench.methods.base import Method, Request


class Stock(Method):
    """Plain classifier-free guidance: e = u + g (c - u), g the pipeline's guidance scale in every step."""

    name = "none"

    def check(self, pipe: Any) -> None:
        """Any pipeline that takes prompts."""

    def generate(self, pipe: Any, request: Request) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        return pipe(**request.arguments).images, [{} for _ in request.prompts]


class Compiled(Stock):
    """Stock on a UNet under `torch.compile(unet, **options)`; the pipeline that was passed is left alone.

    A new batch size compiles again, within the call that is timed: make one call first. RuntimeError without a C compiler.
    """

    name = "compile"
    check = Method.check

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._made: tuple[Any, Any] | None = None

    def prepare(self, pipe: Any) -> Any:
        if not (shutil.which("cc") or shutil.which("c++")):
            raise RuntimeError(f"method {self.name!r} needs a C++ compiler (cc or c++) on PATH for torch.compile")
        if self._made is None or self._made[0] is not pipe.unet:
            self._made = (pipe.unet, torch.compile(pipe.unet, **self.options))
        twin = copy.copy(pipe)
        twin.__dict__["unet"] = self._made[1]
        return twin
