"""Batches to images in this process: while one is made, the files of the one before it are encoded and written."""

from __future__ import annotations

import gc
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from PIL import Image

from fastguard.batch.maker import Maker
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import encode
from fastguard.batch.planning import Batch
from fastguard.batch.request import Request
from fastguard.batch.store import Made

logger = logging.getLogger("fastguard")


@dataclass(frozen=True)
class Failed:
    """An image that could not be made. fatal: the next one would meet the error too (a full disk, no permission)."""

    request: Request
    error: Exception
    message: str
    fatal: bool

    @classmethod
    def of(cls, request: Request, error: Exception) -> Failed:
        # Pillow raises OSErrors of its own, without a number, for what it cannot encode.
        fatal = isinstance(error, OSError) and error.errno is not None and not isinstance(error, IsADirectoryError)
        return cls(request, error, f"{type(error).__name__}: {error}", fatal)


Result = Made | Failed
Pixels = tuple[Request, Image.Image, dict[str, Any]]
Prepare = Callable[[Made], Made]


def attempt(request: Request, work: Callable[[], Made]) -> Result:
    try:
        return work()
    except Exception as error:
        return Failed.of(request, error)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class LocalRunner:
    """engine="local": one process, with the pipeline that `load` gives. settings: of the model, for the records.

    Out of memory halves the batch, and the batches after it are no larger than what fitted. Where another error comes up, the run ends
    with it, or, keeping going, the images of the batch are made one by one.
    """

    phase = ""

    def __init__(self, load: Callable[[], Any], settings: dict[str, Any], options: JobOptions) -> None:
        self.load, self.settings, self.options = load, settings, options
        self.maker: Maker | None = None
        self._limit = options.batch_size  # images per call; fewer once memory was short
        self._stopped = False

    def start(self) -> None:
        self.maker = self.maker or Maker(self.load(), self.settings)

    def run(self, batches: Sequence[Batch], prepare: Prepare) -> Generator[list[Result], None, None]:
        """The images of `batches` in groups; `prepare` is called in a pool, with each of them."""
        threads = self.options.workers or (1 if self.options.engine == "ray" else min(8, os.cpu_count() or 1))
        with ThreadPoolExecutor(threads, thread_name_prefix="fastguard-write") as pool:
            before: list[Any] = []
            for group in chain(self._made(batches), [[]]):
                now = [pool.submit(self._finish, item, prepare) for item in group]
                if before:
                    yield [future.result() for future in before]
                before = now

    def stop(self) -> None:
        """End the run at the next denoising step. Images that were made before are still finished and yielded."""
        self._stopped = True
        if self.maker is not None:
            self.maker.interrupt()

    def close(self) -> None:
        if self.maker is not None:
            self.maker.close()

    def _finish(self, item: Pixels | Failed, prepare: Prepare) -> Result:
        if isinstance(item, Failed):
            return item
        request, image, record = item
        return attempt(request, lambda: prepare(Made(request, record, encode(image, record, self.options))))

    def _made(self, batches: Sequence[Batch]) -> Iterator[Sequence[Pixels | Failed]]:
        assert self.maker is not None
        todo = deque(batches)
        while todo and not self._stopped:
            batch = todo.popleft()
            if len(batch) > self._limit:
                todo.extendleft([batch[self._limit :], batch[: self._limit]])
                continue
            try:
                made = self.maker.make(batch)
            except Exception as error:
                failed = Failed.of(batch[0], error.with_traceback(None))  # the frames keep tensors alive
            else:
                if not self._stopped:  # else it was interrupted in its loop: these are no images
                    yield [(request, *own) for request, own in zip(batch, made, strict=True)]
                continue
            if len(batch) > 1 and out_of_memory(failed.error):
                self._limit = (len(batch) + 1) // 2
                logger.warning("out of memory with %d images at a time: going on with %d", len(batch), self._limit)
                gc.collect()
                torch.cuda.empty_cache()  # does nothing where CUDA was not used
                todo.appendleft(batch)
            elif len(batch) > 1 and self.options.keep_going:
                todo.extendleft([request] for request in reversed(batch))
            else:
                yield [failed]
                if not self.options.keep_going:
                    return
