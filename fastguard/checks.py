"""Validation of values: every error names the argument, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def number(name: str, value: Any, allowed: str, test: Callable[[float], bool] = lambda value: True) -> float:
    """`value` as a finite float that passes `test`. A bool is no number."""
    try:
        valid = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value) and test(float(value))
    except OverflowError:  # an integer beyond every float
        raise ValueError(f"{name}: a number of {len(str(value))} digits; must be {allowed}") from None
    if not valid:
        raise ValueError(f"{name}={value!r}: must be {allowed}")
    return float(value)


def integer(name: str, value: Any, lowest: int) -> int:
    """`value` as an int of at least `lowest`. Neither a bool nor a float is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < lowest:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {lowest}")
    return int(value)


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> Any:
    """`value` if it is one of `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(repr(item) for item in allowed)}")
    return value
