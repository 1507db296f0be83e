"""Every reason to refuse a command in one message: checking goes on after the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Refusals:
    """What was refused so far."""

    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A block that ends at its first ValueError, which is kept."""
        try:
            yield
        except ValueError as error:
            self.said.append(str(error))

    def end(self) -> None:
        """ValueError with all of them, if there were any."""
        if self.said:
            raise ValueError("\n".join(self.said))
