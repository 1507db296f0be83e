"""The fields of a policy: what each may be, and which combinations would have no effect. Errors name the field, its value and what is allowed."""

from collections.abc import Callable, Mapping
from typing import Any

from fastguard.checks import choice, integer, number
from fastguard.files import is_unicode, short

BEFORE = ("zero", "conditional", "opposite")
MOST_STEPS = 10_000
LONGEST_NAME = 200  # characters
LARGEST_SCALE = 1000.0
"""Of guidance: float16 holds numbers to 65,504, and what is guided by thousands is no picture."""

RANGES: dict[str, tuple[float, float]] = {
    "guidance_scale": (0.0, LARGEST_SCALE),
    "before": (-LARGEST_SCALE, LARGEST_SCALE),
    "gate_steps": (1, MOST_STEPS),
    "min_step": (0, MOST_STEPS),
    "opposite_steps": (0, MOST_STEPS),
}
"""Smallest and largest number that a field may hold, in every row of a prompt file too. Each of a tuple is in the range."""


def common_length(values: Mapping[str, Any]) -> int | None:
    """Length of the lists (values per image) among `values`, None if there are none; ValueError if they differ or are empty."""
    lengths = {key: len(value) for key, value in values.items() if isinstance(value, list)}
    if 0 in lengths.values() or len(set(lengths.values())) > 1:
        found = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise ValueError(f"per-image lists must be equally long and not empty: {found}")
    return next(iter(lengths.values()), None)


def checked(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One image's fields, each of its type and in its range (see `fastguard.policies.policy.Policy`); errors begin with `prefix`."""
    try:
        valid = {key: _FIELDS[key](key, value) for key, value in values.items()}
        _combination(valid)
        for key, (lowest, highest) in RANGES.items():
            for value in valid[key] if isinstance(valid[key], tuple) else [valid[key]]:
                if isinstance(value, (int, float)) and not lowest <= value <= highest:
                    raise ValueError(f"{key}={short(value)}: must be from {lowest:g} to {highest:g}")
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
    return valid


def _before(name: str, value: Any) -> str | float:
    allowed = "one of 'zero', 'conditional', 'opposite' or a finite number"
    return value if isinstance(value, str) and value in BEFORE else number(name, value, allowed)


def _guidance_scale(name: str, value: Any) -> float | tuple[float, ...] | None:
    if isinstance(value, tuple) and value:
        return tuple(number(f"{name}[{k}]", item, "a finite number") for k, item in enumerate(value))
    allowed = "None, a finite number or a tuple of finite numbers, one per denoiser row"
    return None if value is None else number(name, value, allowed)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={short(value)}: must be True or False")
    return value


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or not is_unicode(value):
        allowed = f"UTF-8 text that is not empty, of at most {LONGEST_NAME} characters"
        raise ValueError(f"{name}={short(value)}: must be {allowed}")
    return value


def _optional(allowed: str, test: Callable[[float], bool]) -> Callable[[str, Any], float | None]:
    return lambda name, value: None if value is None else number(name, value, f"None or {allowed}", test)


_timestep = _optional("a timestep >= 0", lambda t: t >= 0)
_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "before": _before,
    "transition": lambda name, value: choice(name, value, (None, "static", "dynamic")),
    "t_star": _timestep,
    "rule": lambda name, value: choice(name, value, ("minimum", "drop")),
    "rho": lambda name, value: number(name, value, "a number between 0 and 1, both excluded", lambda rho: 0 < rho < 1),
    "magnitude": lambda name, value: choice(name, value, ("output", "epsilon", "x0")),
    "deadline": _timestep,
    "gate": _optional("a finite number above 0", lambda tau: tau > 0),
    "gate_steps": lambda name, value: integer(name, value, 1),
    "min_step": lambda name, value: integer(name, value, 0),
    "min_drop": lambda name, value: number(name, value, "a number from 0 to below 1", lambda drop: 0 <= drop < 1),
    "opposite_steps": lambda name, value: None if value is None else integer(name, value, 0),
    "monitor": _flag,
    "anchored": _flag,
    "suspect": _optional("a number above 0", lambda bound: bound > 0),
    "guidance_scale": _guidance_scale,
    "name": _name,
}


def _combination(v: Mapping[str, Any]) -> None:
    """Refuse what would have no effect: it is a mistake that nobody would notice."""
    transition, dynamic = v["transition"] is not None, v["transition"] == "dynamic"
    negative = v["before"] == "opposite" or (isinstance(v["before"], float) and v["before"] < 0)
    if v["transition"] == "static" and v["t_star"] is None:
        raise ValueError("t_star=None: transition='static' needs a timestep >= 0")
    # Fields with their defaults, whether what they need is there, and what that is.
    needs: list[tuple[dict[str, Any], bool, str]] = [
        ({"before": "zero"}, transition, "a transition ('static' or 'dynamic')"),
        ({"t_star": None}, v["transition"] == "static", "transition='static'"),
        ({"deadline": None, "rule": "minimum", "magnitude": "output", "min_step": 0}, dynamic, "transition='dynamic'"),
        ({"min_drop": 0.0}, dynamic and v["rule"] == "minimum", "transition='dynamic' with rule='minimum'"),
        ({"rho": 0.3}, dynamic and v["rule"] == "drop", "transition='dynamic' with rule='drop'"),
        ({"gate": None}, transition or v["anchored"], "a transition ('static' or 'dynamic') or anchored=True"),
        ({"monitor": False}, not v["anchored"], "anchored=False (anchored runs both branches anyway)"),
        ({"gate_steps": 1}, v["gate"] is not None, "a gate"),
        ({"opposite_steps": None}, transition and negative, "a transition and before='opposite' or negative"),
    ]
    for fields, met, need in needs:
        for name, default in fields.items():
            if v[name] != default and not met:
                have = ", ".join(f"{key}={v[key]!r}" for key in ("transition", "before", "rule", "gate"))
                raise ValueError(f"{name}={v[name]!r} has no effect here: it needs {need} (have {have})")
