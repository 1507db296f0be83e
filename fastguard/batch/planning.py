"""Requests to batches: full, of one shape, and in the same company after a crash wherever that is possible."""

from collections.abc import Container, Sequence
from typing import Any

from fastguard.batch.request import Request
from fastguard.pipelines.enabled import guard_disabled

Batch = list[Request]


def shape(request: Request) -> tuple[Any, ...]:
    """What all images of one call of a pipeline must have in common; seed, scale, prompts and policy may differ.

    It is the guard that gives each image its own scale: a stock call has one.
    """
    scale = request.stock_scale if guard_disabled() else None
    # Some models take zeros for no negative prompt, and text for an empty one.
    text = request.negative_prompt is None
    return request.steps, request.height, request.width, request.guided, text, request.screen, scale


def arguments(batch: Sequence[Request], scale: float | None = None) -> dict[str, Any]:
    """What a call of the pipeline for requests of one shape takes from them, but for seeds; scale: that of the call, if it has one."""
    first = batch[0]
    given = {
        "prompt": [request.prompt for request in batch],
        "negative_prompt": None if first.negative_prompt is None else [request.negative_prompt for request in batch],
        "num_inference_steps": first.steps,
        "height": first.height,
        "width": first.width,
        "guidance_scale": scale,
    }
    return {name: value for name, value in given.items() if value is not None}


def plan(requests: Sequence[Request], batch_size: int, done: Container[str] = ()) -> list[Batch]:
    """Batches of at most `batch_size` of the requests whose ids are not `done`.

    The plan is made for all requests first. A batch of which nothing is done stays as it is, so its images get the same bits as in
    a run that was never interrupted; what is left of the others is put together anew.
    """
    whole, left = [], []
    for batch in _grouped(requests, batch_size):
        rest = [request for request in batch if request.id not in done]
        if len(rest) == len(batch):
            whole.append(batch)
        else:
            left.extend(rest)
    return _grouped(left, batch_size) + whole


def _grouped(requests: Sequence[Request], batch_size: int) -> list[Batch]:
    groups: dict[tuple[Any, ...], Batch] = {}
    for request in requests:
        groups.setdefault(shape(request), []).append(request)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
