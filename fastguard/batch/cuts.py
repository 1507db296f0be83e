"""What of a text no encoder of a pipeline reads: stock only logs it, and two prompts that differ there make one picture."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")  # components of pipelines


class Cuts:
    """`read` texts, then `[text]` is the end of one that is beyond every encoder's length; empty for most.

    Tokenizers hold the state of their last call: `read` must run in the thread in which the pipeline tokenizes.
    """

    def __init__(self, pipe: Any) -> None:
        found = [getattr(pipe, name, None) for name in TOKENIZERS]
        self._tokenizers = [tokenizer for tokenizer in found if hasattr(tokenizer, "model_max_length")]
        call = inspect.signature(type(pipe).__call__).parameters
        self._longest = call["max_sequence_length"].default if "max_sequence_length" in call else None
        self._cut: dict[str, str] = {}

    def read(self, texts: Iterable[str | None]) -> None:
        distinct = list(dict.fromkeys(text for text in texts if text))
        if not distinct or not self._tokenizers:
            return
        ends = zip(*(self._ends(tokenizer, distinct) for tokenizer in self._tokenizers), strict=True)
        # The encoder that reads furthest decides.
        self._cut.update((text, min(own, key=len)) for text, own in zip(distinct, ends, strict=True) if all(own))

    def __getitem__(self, text: str | None) -> str:
        return self._cut.get(text or "", "")

    def _ends(self, tokenizer: Any, texts: list[str]) -> list[str]:
        # CLIP's length is its own, the call's argument is for the others.
        clip = type(tokenizer).__name__.startswith("CLIP")
        limit = tokenizer.model_max_length if clip or self._longest is None else self._longest
        # Of what an encoder gets, `limit` tokens at most, the last is the end of the text.
        return [
            tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True) if len(ids) > limit else ""
            for ids in tokenizer(texts, truncation=False, verbose=False).input_ids
        ]
