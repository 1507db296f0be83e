"""Units in several processes: each makes whole units with one share of the cores, the parent alone writes to the store, in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

import torch

from bench.paper.work import Made, Unit

Prepare = Callable[[], Callable[[Unit], Made]]
_prepare: Prepare | None = None
_make: Callable[[Unit], Made] | None = None


def _start(parent: int, threads: int, prepare: Prepare) -> None:
    """In a new process: leave when the parent is gone, since it may have been killed."""
    global _prepare

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)
    _prepare = prepare


def _one(unit: Unit) -> Made:
    """What is needed is loaded here, not in `_start`: so the parent gets the error of a process that cannot load it."""
    global _make
    if _make is None:
        assert _prepare is not None
        _make = _prepare()
    return _make(unit)


@contextmanager
def workers(prepare: Prepare, processes: int) -> Iterator[Callable[[Iterable[Unit]], Iterator[Made]]]:
    """Gives what makes rows and pictures of units, in their order. `prepare` (pickled) runs once in each process.

    The first error of a process is raised, RuntimeError where one was killed. Whatever error leaves the block, the processes end at once.
    """
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # a forked one cannot use CUDA
    with ProcessPoolExecutor(processes, context, _start, (os.getpid(), threads, prepare)) as pool:
        try:
            yield partial(pool.map, _one)
        except BrokenProcessPool:
            raise RuntimeError(
                f"one of {processes} processes was killed, for want of memory perhaps; finished results are kept: "
                "run the same command again, or with fewer --processes"
            ) from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # the pool would wait for what they are at, and for what lies ready for them
            raise
