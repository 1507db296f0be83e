"""Where the host waits: every synchronisation and every copy between host and device in a pipeline's denoising loop, line by line.

    fastguard.assert_sync_free(pipe)          # raises with the list if there are any
    print(fastguard.find_syncs(pipe))         # the list

The pipeline's own `__call__` runs, for a few steps, guarded if it is guarded; the pipeline itself is left as it is. On a GPU the
program is watched as it runs, under torch's sync debug mode. Without one it runs on a CUDA device that is not there
(`pretend`), and the model costs no memory, whatever its size.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastguard.pipelines.guard import Guard
from fastguard.syncs import probe
from fastguard.syncs.stream import TO_DEVICE, TO_HOST, WAIT, Op, Stream, Watching, innermost_line


@dataclass(frozen=True)
class SyncReport:
    """What was found.

    pipeline, scheduler  class names
    guarded              whether the pipeline was guarded
    technique            "gpu", or "labelled" tensors
    steps                denoiser calls that ran
    ops                  operations in the loop that synchronise or copy; `Op.row` counts the denoiser calls before them
    broke_off            why the loop did not run to its end, if it did not (somebody in the denoiser, which has no values then, wanted one)
    """

    pipeline: str
    scheduler: str
    guarded: bool
    technique: str
    steps: int
    ops: tuple[Op, ...]
    broke_off: str | None = None

    @property
    def free(self) -> bool:
        """The loop ran to its end without a synchronisation or copy."""
        return not self.ops and self.broke_off is None

    def lines(self) -> list[dict[str, Any]]:
        """By line of Python, in the order of their first occurrence."""
        places: dict[tuple[str, str, str, bool], list[int]] = {}
        for op in self.ops:
            places.setdefault((op.line, op.code, op.sync, op.denoiser), []).append(op.row)
        return [
            {"line": line, "code": code, "kind": kind, "count": len(rows), "in_denoiser": inside, "rows": sorted(set(rows))}
            for (line, code, kind, inside), rows in places.items()
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        names = ("pipeline", "scheduler", "guarded", "technique", "steps", "broke_off", "free")
        return {**{name: getattr(self, name) for name in names}, "lines": self.lines()}

    def __str__(self) -> str:
        kinds = Counter(op.sync for op in self.ops)
        counts = ", ".join(f"{kinds[kind]} x {kind}" for kind in (WAIT, TO_HOST, TO_DEVICE) if kinds[kind])
        how = "guarded" if self.guarded else "stock"
        head = f"{self.pipeline} ({how}), {self.scheduler}, {self.steps} denoiser calls, {self.technique} tensors: "
        text = [head + (counts or "no synchronisation, no copy")]
        for found in self.lines():
            where = f"{found['line']}{' (in the denoiser)' if found['in_denoiser'] else ''}"
            rows = f"after denoiser calls {found['rows'][0]} to {found['rows'][-1]}"
            text += [f"  {found['count']:>4} x {found['kind']:<15}  {where}  {rows}", f"         {found['code']}"]
        if self.broke_off is not None:
            text.append(f"  the loop broke off: {self.broke_off}")
        return "\n".join(text)


def find_syncs(pipe: Any, *, steps: int = 4, **arguments: Any) -> SyncReport:
    """Run a call of `pipe` and report where its denoising loop waits for the device or copies from or to it.

    pipe       a diffusers pipeline that shows a progress bar around its loop, guarded or not, on a GPU or on the CPU
    steps      num_inference_steps of the call
    arguments  of the call. Without any, text-to-image pipelines get one prompt's embeddings (zeros)

    ValueError where the arguments of the call are needed and missing.
    """
    on_gpu = torch.device(pipe.device).type == "cuda"
    given = {"output_type": "latent", "num_inference_steps": steps, **(arguments or probe.example_arguments(pipe))}
    stream = Stream()
    try:
        (_on_gpu if on_gpu else probe.run)(pipe, given, stream)
    except Exception as error:  # before the loop; whatever happens in it is reported
        if on_gpu and arguments:
            raise
        raise ValueError(
            f"{type(pipe).__name__}: the call broke off before its loop ({error}); pass the arguments of a call, e.g. image=..., "
            "prompt_embeds=...; pictures may have to be given as latents, which need no encoder"
        ) from error
    technique, guarded = "gpu" if on_gpu else "labelled", Guard.of(pipe) is not None
    names = type(pipe).__name__, type(pipe.scheduler).__name__
    return SyncReport(*names, guarded, technique, steps=stream.row, ops=tuple(stream.ops), broke_off=stream.broke_off)


def assert_sync_free(pipe: Any, *, steps: int = 4, **arguments: Any) -> SyncReport:
    """`find_syncs`, and AssertionError with its report unless the loop ran to its end without a synchronisation or copy."""
    report = find_syncs(pipe, steps=steps, **arguments)
    if not report.free:
        raise AssertionError(str(report))
    return report


def _on_gpu(pipe: Any, arguments: Mapping[str, Any], stream: Stream) -> None:
    """The call on the GPU that the pipeline is on; a first call, unwatched, compiles and allocates."""
    moved = {k: v.to(pipe.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    copied = probe.copy_of(pipe, stream, None)
    copied(**moved)
    denoiser = next(model for name in probe.DENOISERS if (model := getattr(pipe, name, None)) is not None)
    begins, ends = denoiser.register_forward_pre_hook(stream.enter), denoiser.register_forward_hook(stream.leave)
    with begins, ends, Watching(stream), _sync_debug(stream):
        copied(**moved)


@contextmanager
def _sync_debug(stream: Stream) -> Iterator[None]:
    """torch's sync debug mode, its warnings as operations of the stream (unless the line has been noted for one already)."""

    def note(message: Warning | str, *_: Any) -> None:
        if stream.open and "synchroniz" in str(message).lower():
            stream.warned(innermost_line())

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note  # type: ignore[assignment]
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
