"""Numbers with their intervals as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def share(value: dict | None, interval: bool = True) -> str:
    """A share with its interval, in percent."""
    if value is None:
        return "-"
    text = f"{value['mean']:.0%}" if value["mean"] in (0, 1) else f"{value['mean']:.1%}"
    return f"{text} [{value['low']:.0%}, {value['high']:.0%}]" if interval else text


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def between(value: dict | None, form: str = ".2f") -> str:
    """A number with its interval."""
    if value is None:
        return "-"
    return f"{value['mean']:{form}} [{number(value['low'], form)}, {number(value['high'], form)}]"
