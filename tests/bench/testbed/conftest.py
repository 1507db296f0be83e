"""The embedded model and its judge, as in the tests of the room that loads it."""

from tests.testbed.conftest import _guard_off, judge, noise, pipe

__all__ = ["_guard_off", "judge", "noise", "pipe"]
