"""SIGTERM and SIGINT end a run in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(RuntimeError):
    """A signal ended the run; what is in the manifest is done, and the same call resumes."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"interrupted by {signal.Signals(number).name}; the same call resumes")


@contextmanager
def interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """The first signal calls `stop`, a second one does what it did before. `Interrupted` at the end if there was one.

    In another thread than the main one signals cannot be caught: then they do what they did.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    stopped: list[int] = []

    def handle(number: int, frame: Any) -> None:
        stopped.append(number)
        restore()
        stop()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
    if stopped:
        raise Interrupted(stopped[0])
