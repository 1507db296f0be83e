"""Files of prompts. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")  # components of the supported pipelines

FIELDS = ("prompt", "group")


def read_jsonl(path: Path) -> tuple[list[str], list[str] | None]:
    """The "prompt" of every line's JSON object, and the "group" of every line if they have one.

    A prompt is given back as it stands; a group without the spaces around it. Neither differs from another by spaces alone: that changes
    no token. ValueError if a line has no prompt, repeats one, is not JSON, has another field or has a group where others have none;
    OSError if the file cannot be read.
    """
    prompts: list[str] = []
    groups: list[str] = []
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        where = f"prompts={str(path)!r}: line {number}"
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{where} is not {{"prompt": "..."}}')
        unknown = [key for key in value if key not in FIELDS]
        if unknown:
            raise ValueError(f"{where} has the field {unknown[0]!r}: allowed are {', '.join(FIELDS)}")
        if (first := seen.setdefault(_spaced(prompt), number)) != number:
            raise ValueError(f"{where} repeats line {first}: it is no further draw")
        group = value.get("group")
        if group is not None and (not isinstance(group, str) or not group.strip()):
            raise ValueError(f"{where} has group={group!r}: must be a text")
        if number > 1 and (group is None) == bool(groups):
            raise ValueError(f"{where}: either every line has a group, or none")
        prompts.append(prompt)
        groups += [] if group is None else [_spaced(group)]
    return prompts, groups or None


def check_tokens(pipe: Any, prompts: list[str], path: Path) -> None:
    """ValueError if two lines are the same to all tokenizers of the pipeline: by their case, say, or only beyond what is cut off."""
    present = [getattr(pipe, name, None) for name in TOKENIZERS]
    ids = [tokenizer(prompts, truncation=True).input_ids for tokenizer in present if tokenizer is not None]
    seen: dict[str, int] = {}
    for number, tokens in enumerate(zip(*ids, strict=True), 1):
        if (first := seen.setdefault(str(tokens), number)) != number:
            raise ValueError(
                f"prompts={str(path)!r}: line {number} has the tokens of line {first}: it is no further draw"
            )


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"prompts={str(path)!r}: is not UTF-8 text") from None
    if not text:
        raise ValueError(f"prompts={str(path)!r}: the file is empty")
    # not splitlines: it splits at U+2028 and others too, which JSON allows within a string
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if not line.strip():
            raise ValueError(f"prompts={str(path)!r}: line {number} is empty")
        yield number, line.strip()
