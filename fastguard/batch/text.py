"""Prompts to embeddings, once per distinct prompt, and in the same company in every run of a job."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastguard.batch.memory import halving
from fastguard.batch.request import Request

CHUNK = 32  # prompts per call of the text encoders
CACHE = 256 * 2**20  # bytes of embeddings that are kept

# Names under which `__call__` takes what `encode_prompt` returns: SD has the first two, SDXL and SD3 all.
_POSITIVE, _NEGATIVE = (
    ("prompt_embeds", "pooled_prompt_embeds"),
    ("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
)


class TextStage:
    """The embeddings of a batch as keyword arguments of the pipeline. The caller switches gradients off.

    Distinct prompts are encoded in chunks that are cut from the list of all prompts of the job, done or not: the bits of an
    embedding depend (in the last place) on the company, so a resumed run gets the same ones. With negative prompts likewise.

    Without `requests` the job is not known as a whole, as in an actor. Then the chunks are cut from each batch anew: the bits do not
    depend on what the actor happened to have before.
    """

    def __init__(self, pipe: Any, requests: Iterable[Request], device: Any) -> None:
        self.pipe, self.device = pipe, device
        call = inspect.signature(type(pipe).__call__).parameters
        accepted = inspect.signature(type(pipe).encode_prompt).parameters
        self._options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in accepted}
        if "max_sequence_length" in accepted:
            self._options["max_sequence_length"] = call["max_sequence_length"].default
        self._plan(list(requests))
        self._whole = bool(self._chunks)

    def _plan(self, requests: Sequence[Request]) -> None:
        self._chunks: dict[tuple[bool, str | None], tuple[str | None, ...]] = {}
        self._cache: OrderedDict[tuple[bool, str | None], list[torch.Tensor]] = OrderedDict()
        self._bytes = 0
        for negative in (False, True):
            texts = [r.negative_prompt if negative else r.prompt for r in requests if r.guided or not negative]
            # None is no text: some models take zeros for it, and it is encoded alone.
            distinct = [text for text in dict.fromkeys(texts) if text is not None]
            for i in range(0, len(distinct), CHUNK):
                chunk = tuple(distinct[i : i + CHUNK])
                self._chunks.update(((negative, text), chunk) for text in chunk)

    def encode(self, batch: Sequence[Request]) -> dict[str, torch.Tensor]:
        """prompt_embeds and so on, [len(batch), ...]; the negative ones only where the pipeline is guided."""
        if not self._whole:
            self._plan(batch)
        arguments = self._stacked(_POSITIVE, [self._embeds(False, r.prompt) for r in batch])
        if batch[0].guided:
            arguments |= self._stacked(_NEGATIVE, [self._embeds(True, r.negative_prompt) for r in batch])
        return arguments

    @staticmethod
    def _stacked(names: Sequence[str], rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack(list(column)) for name, column in zip(names, zip(*rows, strict=True), strict=False)}

    def _embeds(self, negative: bool, text: str | None) -> list[torch.Tensor]:
        key = (negative, text)
        if key not in self._cache:
            chunk = self._chunks.get(key, (text,))
            columns = [torch.cat(c) for c in zip(*halving(lambda part: self._run(negative, part), chunk), strict=True)]
            for i, member in enumerate(chunk):
                if (negative, member) not in self._cache:
                    rows = [column[i].clone() for column in columns]
                    self._cache[negative, member] = rows
                    self._bytes += sum(row.nbytes for row in rows)
        self._cache.move_to_end(key)
        found = self._cache[key]
        while self._bytes > CACHE and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= sum(row.nbytes for row in dropped)
        return found

    def _run(self, negative: bool, texts: Sequence[str | None]) -> list[torch.Tensor]:
        prompts = ["" if text is None else text for text in texts]
        options = {"negative_prompt": None if None in texts else prompts} if negative else {}
        outputs = self.pipe.encode_prompt(
            prompt=prompts,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=negative,
            **options,
            **self._options,
        )
        return list(outputs[int(negative) :: 2])
