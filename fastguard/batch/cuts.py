"""What of a text no encoder of a pipeline reads: stock only logs it, and two prompts that differ there make one picture."""

import inspect
from collections.abc import Iterable
from typing import Any

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")  # components of pipelines


def cuts(pipe: Any, texts: Iterable[str | None]) -> dict[str, str]:
    """The ends of those texts that are beyond every encoder's length.

    Tokenizers hold the state of their last call: to be called in the thread in which the pipeline tokenizes.
    """
    tokenizers = [found for name in TOKENIZERS if hasattr(found := getattr(pipe, name, None), "model_max_length")]
    distinct = list(dict.fromkeys(text for text in texts if text))
    if not distinct or not tokenizers:
        return {}
    call = inspect.signature(type(pipe).__call__).parameters
    longest = call["max_sequence_length"].default if "max_sequence_length" in call else None
    ends = zip(*(_ends(tokenizer, distinct, longest) for tokenizer in tokenizers), strict=True)
    # The encoder that reads furthest decides.
    return {text: min(own, key=len) for text, own in zip(distinct, ends, strict=True) if all(own)}


def _ends(tokenizer: Any, texts: list[str], longest: int | None) -> list[str]:
    # CLIP's length is its own, the call's argument is for the others.
    clip = type(tokenizer).__name__.startswith("CLIP")
    limit = tokenizer.model_max_length if clip or longest is None else longest
    # Of what an encoder gets, `limit` tokens at most, the last is the end of the text.
    return [
        tokenizer.decode(ids[limit - 1 : -1], skip_special_tokens=True) if len(ids) > limit else ""
        for ids in tokenizer(texts, truncation=False, verbose=False).input_ids
    ]
