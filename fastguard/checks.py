"""Validation of values: every error names the argument, the value and what is allowed."""

import difflib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from fastguard.files import short


def number(name: str, value: Any, allowed: str, test: Callable[[float], bool] = lambda value: True) -> float:
    """`value` as a finite float that passes `test`. A bool is no number."""
    try:
        valid = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value) and test(float(value))
    except OverflowError:  # an integer beyond every float
        valid = False
    if not valid:
        raise ValueError(f"{name}={short(value)}: must be {allowed}")
    return float(value)


def integer(name: str, value: Any, lowest: int, highest: int | None = None) -> int:
    """`value` as an int of at least `lowest` and at most `highest`. Neither a bool nor a float is an integer."""
    valid = isinstance(value, Integral) and not isinstance(value, bool)
    if not valid or value < lowest or (highest is not None and value > highest):
        allowed = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name}={short(value)}: must be an integer {allowed}")
    return int(value)


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> Any:
    """`value` if it is one of `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        names = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{name}={short(value)}: allowed are {names}{meant(value, allowed)}")
    return value


def meant(value: Any, allowed: Iterable[Any]) -> str:
    """The end of an error message: which of `allowed` a near miss may have been; empty if none is near."""
    names = [name for name in allowed if isinstance(name, str)]
    near = difflib.get_close_matches(value[:100], names, 1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def extra(module: str, name: str, purpose: str) -> Any:
    """An optional package. ValueError, in one line with the command that installs it, if it is not there.

    name: of the extra that brings it; purpose: what needs it, the beginning of the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"{purpose}: needs {package}; pip install 'diffusers-fastguard[{name}]'") from None


def warn(message: str) -> None:
    """A warning that points at the caller's line: the first frame outside of this package, diffusers and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("fastguard", "diffusers", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
