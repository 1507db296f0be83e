"""Files of prompts. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(path: Path) -> tuple[list[str], list[str] | None]:
    """The "prompt" of every line's JSON object, and the "group" of every line if they have one.

    ValueError if a line has no prompt, repeats one, is not JSON or has a group where others have none; OSError if the file cannot be read.
    """
    found: dict[str, int] = {}
    groups: list[str] = []
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'prompts={str(path)!r}: line {number} is not {{"prompt": "..."}}')
        if prompt in found:
            raise ValueError(
                f"prompts={str(path)!r}: line {number} repeats line {found[prompt]}: it is no further draw"
            )
        found[prompt] = number
        group = value.get("group")
        if group is not None and (not isinstance(group, str) or not group.strip()):
            raise ValueError(f"prompts={str(path)!r}: line {number} has group={group!r}: must be a text")
        if number > 1 and (group is None) == bool(groups):
            raise ValueError(f"prompts={str(path)!r}: line {number}: either every line has a group, or none")
        groups += [] if group is None else [group]
    return list(found), groups or None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"prompts={str(path)!r}: is not UTF-8 text") from None
    if not lines:
        raise ValueError(f"prompts={str(path)!r}: the file is empty")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"prompts={str(path)!r}: line {number} is empty")
        yield number, line.strip()
