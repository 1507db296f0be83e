"""Units in several processes: each makes whole units with one share of the cores, the parent alone writes to the store, in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from bench.paper.work import Made, Unit

_make: Callable[[Unit], Made] | None = None


def _start(parent: int, threads: int, prepare: Callable[[], Callable[[Unit], Made]]) -> None:
    """In a new process: load what is needed; leave when the parent is gone, since it may have been killed."""
    global _make

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(threads)
    _make = prepare()


def _one(unit: Unit) -> Made:
    assert _make is not None
    return _make(unit)


def made(work: Sequence[Unit], prepare: Callable[[], Callable[[Unit], Made]], processes: int) -> Iterator[Made]:
    """Rows and pictures of every unit, in the order of `work`. `prepare` (pickled) runs once in each process."""
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _start, (os.getpid(), threads, prepare)) as pool:
        yield from pool.imap(_one, work)
