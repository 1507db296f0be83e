"""Files of prompts. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path


def read_jsonl(path: Path) -> list[str]:
    """The "prompt" of every line's JSON object. ValueError if a line has none or is not JSON, OSError if it cannot be read."""
    found = []
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'prompts={str(path)!r}: line {number} is not {{"prompt": "..."}}')
        found.append(prompt)
    return found


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
