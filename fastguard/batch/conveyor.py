"""Many batches: while one is made, the files of the one before it are encoded and written."""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from fastguard.batch.maker import Maker
from fastguard.batch.planning import Batch
from fastguard.batch.request import Request
from fastguard.batch.store import Made

logger = logging.getLogger("fastguard")

Finish = Callable[[Request, Image.Image, dict[str, Any]], Made]


@dataclass(frozen=True)
class Failed:
    """An image that could not be made, where the run goes on without it."""

    request: Request
    message: str

    @classmethod
    def of(cls, request: Request, error: BaseException) -> Failed:
        return cls(request, f"{type(error).__name__}: {error}")


def finished(work: Callable[[], Made], request: Request, keep_going: bool) -> Made | Failed:
    """What `work` makes of an image; keeping going, an image that cannot be encoded, or whose name a directory has, is `Failed`.

    Other errors of the system (a full disk, no permission) are raised all the same: the next image would meet them too.
    """
    try:
        return work()
    except Exception as error:
        # Pillow raises OSErrors of its own, without a number, for what it cannot encode.
        systems = isinstance(error, OSError) and error.errno is not None and not isinstance(error, IsADirectoryError)
        if systems or not keep_going or out_of_memory(error):
            raise
        return Failed.of(request, error)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation that failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class Conveyor:
    """Runs batches through `maker`.

    finish      called in a pool, once per image, with its request, pixels and record
    workers     threads of that pool
    keep_going  an image that fails is yielded as `Failed` (see `finished`); otherwise its error ends the run

    Out of memory halves the batch, and the batches after it are no larger than what fitted.
    """

    def __init__(self, maker: Maker, finish: Finish, *, workers: int | None = None, keep_going: bool = False) -> None:
        self.maker, self.finish, self.keep_going = maker, finish, keep_going
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.limit: int | None = None  # images per call, once memory was short
        self._stopped = False
        self._errors: list[Exception] = []

    def stop(self) -> None:
        """End the run at the next denoising step. Images that were made before are still finished and yielded."""
        self._stopped = True
        self.maker.interrupt()

    def run(self, batches: Iterable[Batch]) -> Generator[list[Made | Failed], None, None]:
        """The images in groups. Whatever ends the run, those that are made are yielded first."""
        made = self._made(batches)
        before: list[Future[Made | Failed]] = []
        with ThreadPoolExecutor(self.workers, thread_name_prefix="fastguard-write") as pool:
            while True:
                works = self._next(made)
                now = [pool.submit(work) for work in works]
                if group := self._results(before):
                    yield group
                if not now:
                    break
                before = now
        if self._errors:
            raise self._errors[0]

    def _next(self, made: Iterator[list[Callable[[], Made | Failed]]]) -> list[Callable[[], Made | Failed]]:
        try:
            return next(made, [])
        except Exception as error:
            self._errors.append(error)
            return []

    def _results(self, futures: Iterable[Future[Made | Failed]]) -> list[Made | Failed]:
        results = []
        for future in futures:
            try:
                results.append(future.result())
            except Exception as error:
                self._errors.append(error)
                self.stop()
        return results

    def _made(self, batches: Iterable[Batch]) -> Iterator[list[Callable[[], Made | Failed]]]:
        """What is left to do for the images of each batch, once it is made: of as many as the memory allows or, keeping going and one
        image fails, of single ones."""
        todo = deque(batches)
        while todo and not self._stopped:
            batch = todo.popleft()
            if self.limit is not None and len(batch) > self.limit:
                todo.extendleft([batch[self.limit :], batch[: self.limit]])
                continue
            try:
                images = self.maker.make(batch)
            except Exception as error:
                failure = error.with_traceback(None)  # the frames keep tensors alive
            else:
                if not self._stopped:  # else it was interrupted in its loop: these are no images
                    yield [self._finishing(request, *made) for request, made in zip(batch, images, strict=True)]
                continue
            if len(batch) > 1 and out_of_memory(failure):
                self.limit = (len(batch) + 1) // 2
                logger.warning("out of memory with %d images at a time: going on with %d", len(batch), self.limit)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                todo.appendleft(batch)
            elif not self.keep_going:
                raise failure
            elif len(batch) > 1:
                todo.extendleft([request] for request in reversed(batch))
            else:
                failed = Failed.of(batch[0], failure)
                yield [lambda failed=failed: failed]  # type: ignore[misc]

    def _finishing(self, request: Request, image: Image.Image, record: dict[str, Any]) -> Callable[[], Made | Failed]:
        work = functools.partial(self.finish, request, image, record)
        return functools.partial(finished, work, request, self.keep_going)
