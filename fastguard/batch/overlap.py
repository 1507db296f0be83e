"""The stages of many batches: while one batch is denoised, the next prompts are encoded and the last images decoded and written.

    text thread  ->  the caller's thread: denoise  ->  decoding thread  ->  pool: encode the file, write it  ->  the caller: commit

Each arrow is a short queue, so nothing runs far ahead. The caller commits between two batches.

Where text and decoding would only take the cores from the loop (`Stages.overlap`) they take turns with it in the caller's thread, and
the writing alone goes on beside it.

On the CPU the loop needs its threads undisturbed. Once the OpenMP teams of a process have more threads than there are cores, idle ones
sleep instead of spinning, and every small operation waits for them to wake: 1.5 times as long for the embedded model on two cores. So
the loop runs in the caller's thread, whose team is there already, and the other stages make none.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image

from fastguard.batch.decoding import Decoded
from fastguard.batch.memory import free, out_of_memory
from fastguard.batch.planning import Batch
from fastguard.batch.request import Request
from fastguard.batch.stages import Denoised, Stages
from fastguard.batch.store import Made

logger = logging.getLogger("fastguard")

Finish = Callable[[Request, Image.Image, dict[str, Any]], Made]
T = TypeVar("T")
GROUP = 64  # images committed at once, at most
BACKLOG = 64  # decoded images that wait to be written, at most: more than a batch, or the loop waits for the disk


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


class Conveyor:
    """Runs batches through `stages`.

    finish      called in a pool, once per image, with its request, pixels and record
    workers     threads of that pool
    keep_going  an image that fails is yielded as `Failed` (see `finished`); otherwise its error ends the run

    Out of memory halves the batch, and the batches after it are no larger than what fitted.
    """

    def __init__(self, stages: Stages, finish: Finish, *, workers: int | None = None, keep_going: bool = False) -> None:
        self.stages, self.finish, self.keep_going = stages, finish, keep_going
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.limit: int | None = None  # images per call, once memory was short
        self._stop, self._abandon = threading.Event(), threading.Event()
        self._errors: list[BaseException] = []

    def stop(self) -> None:
        """End the run at the next denoising step. Images past their loop are still finished and yielded."""
        self._stop.set()
        self.stages.interrupt()

    def run(self, batches: Iterable[Batch]) -> Iterator[list[Made | Failed]]:
        """The images in the order in which they get ready, in groups. Whatever ends the run, those that are ready are yielded first."""
        overlap = self.stages.overlap
        texts: queue.Queue = queue.Queue(1 if overlap else 0)
        latents: queue.Queue = queue.Queue(1 if overlap else 0)
        results: queue.Queue = queue.Queue()
        self._slots = threading.Semaphore(BACKLOG)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="fastguard-write") as self._pool:
            text = self._steps(self._encode, batches, texts, self._stop)
            loop = self._steps(self._denoise, iter(texts.get, None), latents, self._stop)
            decoding = self._steps(self._decode, iter(latents.get, None), results, self._abandon)
            threads = _single_threaded(text, decoding) if overlap else []
            try:
                for _ in loop if overlap else _in_turn(text, texts, loop, latents, decoding):
                    yield from self._ready(results, wait=False)
                yield from self._ready(results, wait=True)
            finally:
                self._abandon.set()
                if any(thread.is_alive() for thread in threads):
                    self.stop()
                for steps in (loop,) if overlap else (text, loop, decoding):
                    steps.close()
                for thread in threads:
                    thread.join()
                self._pool.shutdown(cancel_futures=True)
        if self._errors:
            raise self._errors[0]

    def _ready(self, results: queue.Queue, wait: bool) -> Iterator[list[Made | Failed]]:
        """What is finished, in groups: one flush to the disk serves many images. wait: for all that is still to come."""
        group: list[Made | Failed] = []
        while wait or not results.empty():
            if group and (len(group) >= GROUP or results.empty()):
                yield group
                group = []
            if not wait and isinstance(results.queue[0], Future) and not results.queue[0].done():
                break
            item = results.get()
            if item is None:
                break
            group += self._result(item)
        if group:
            yield group

    def _result(self, item: Failed | Future[Made | Failed]) -> list[Made | Failed]:
        if isinstance(item, Failed):
            return [item]
        try:
            return [item.result()]
        except BaseException as error:
            self._fail(error)
            return []

    def _steps(
        self, work: Callable[[Any], Iterable[Any]], source: Iterable[Any], sink: queue.Queue, halt: threading.Event
    ) -> Generator[None, None, None]:
        """One stage, an item at a time. However it ends it empties its source and ends its sink: nobody waits for ever."""
        source, failed = iter(source), False
        try:
            for item in source:
                if not failed and not halt.is_set():
                    try:
                        for output in [item] if isinstance(item, Failed) else work(item):
                            sink.put(output)
                    except BaseException as error:
                        failed = True
                        self._fail(error)
                yield
        finally:
            deque(source, 0)
            sink.put(None)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self.stop()

    def _encode(self, batch: Batch) -> Iterator[Any]:
        yield from self._parts(batch, lambda part, _: (part, self.stages.encode(part)))

    def _denoise(self, item: tuple[Batch, dict[str, Any]]) -> Iterator[Any]:
        batch, text = item

        def work(part: Batch, start: int) -> Denoised:
            arguments = {name: value[start : start + len(part)] for name, value in text.items()}
            return self.stages.denoise(part, arguments)

        for output in self._parts(batch, work):
            if self._stop.is_set():  # interrupted in its loop: these are no images
                return
            yield output

    def _decode(self, item: Denoised) -> Iterator[Any]:
        for index, decoded in enumerate(self._images(item)):
            if isinstance(decoded, Failed):
                yield decoded
                continue
            record = self.stages.record(item, index, decoded)
            while not self._slots.acquire(timeout=0.1):
                if self._abandon.is_set():
                    return
            request = item.batch[index]
            work = functools.partial(self.finish, request, decoded.image, record)
            future = self._pool.submit(finished, work, request, self.keep_going)
            future.add_done_callback(lambda _: self._slots.release())
            yield future

    def _images(self, item: Denoised) -> list[Decoded | Failed]:
        """Decoded, or one by one where that fails and the run keeps going."""
        try:
            return list(self.stages.decode(item))
        except Exception as error:
            if not self.keep_going:
                raise
            failure = _without_frames(error)
        if len(item.batch) == 1 or item.latents is None:
            return [Failed.of(request, failure) for request in item.batch]
        singles = [
            dataclasses.replace(item, batch=[request], latents=item.latents[i : i + 1])
            for i, request in enumerate(item.batch)
        ]
        return [image for single in singles for image in self._images(single)]

    def _parts(self, batch: Batch, work: Callable[[Batch, int], T]) -> Iterator[T | Failed]:
        """work(part, start) for parts as large as the memory allows or, keeping going and one image fails, single ones."""
        todo = [(0, len(batch))]
        while todo and not self._stop.is_set():
            start, end = todo.pop(0)
            if self.limit is not None and end - start > self.limit:
                todo.insert(0, (start + self.limit, end))
                end = start + self.limit
            part = batch[start:end]
            try:
                yield work(part, start)
                continue
            except Exception as error:
                failure = _without_frames(error)
            count, short = end - start, out_of_memory(failure)
            if count > 1 and (short or self.keep_going):
                if short:
                    self.limit = (count + 1) // 2
                    logger.warning("out of memory with %d images at a time: going on with %d", count, self.limit)
                    free()
                    todo.insert(0, (start, end))
                else:
                    todo[:0] = [(i, i + 1) for i in range(start, end)]
            elif self.keep_going:
                yield Failed.of(part[0], failure)
            else:
                raise failure


def _in_turn(
    text: Iterator[None], texts: queue.Queue, loop: Iterator[None], latents: queue.Queue, decoding: Iterator[None]
) -> Iterator[None]:
    """All stages in this thread: what one puts into its queue goes through the others before the next batch is begun."""
    for _ in text:
        while not texts.empty():
            next(loop)
            while not latents.empty():
                next(decoding)
            yield
    yield from loop
    yield from decoding


def _without_frames(error: Exception) -> Exception:
    """An error that no longer keeps the tensors of its frames alive."""
    return error.with_traceback(None)


def _single_threaded(*stages: Iterator[None]) -> list[threading.Thread]:
    """Threads, started, that exhaust the stages; inside torch each uses one CPU. The caller's own number stays."""
    count = torch.get_num_threads()
    started = threading.Barrier(len(stages) + 1)

    def run(steps: Iterator[None]) -> None:
        torch.get_num_threads()  # a thread takes the process' number on first use: now, and not after it was given its own
        torch.set_num_threads(1)  # of this thread, but the process' number too
        started.wait()
        deque(steps, 0)

    threads = [threading.Thread(target=run, args=(steps,), daemon=True) for steps in stages]
    for thread in threads:
        thread.start()
    started.wait()
    torch.set_num_threads(count)
    return threads
