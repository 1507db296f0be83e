"""Run a pipeline's own call on a device that is not there (or on a GPU), with a `Stream` listening to its denoising loop.

The call runs on a copy of the pipeline object. Only the denoiser (and a ControlNet) is put on the device, as a fake copy that costs
no memory; its forward is run once for each kind of arguments. The loop is what runs inside the pipeline's progress bar: all of it,
from before the first `scheduler.scale_model_input` to after the last `scheduler.step`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from fastguard.pipelines.guard import Guard, enable
from fastguard.syncs.pretend import DEVICE, Labelled, Pretend
from fastguard.syncs.stream import Op, Stream

_DENOISERS = ("unet", "transformer", "transformer_2")


class Memory:
    """Fake copies of models and what their forward gave for each kind of arguments, for use by several runs (`remembering`)."""

    def __init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.models: dict[torch.nn.Module, Any] = {}
        self.results: dict[tuple[torch.nn.Module, str], tuple[Any, list[Op]]] = {}


_memory: ContextVar[Memory | None] = ContextVar("_memory", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Inside, a model that has been run is not copied again, nor run again on arguments of the same kind: do not change it."""
    token = _memory.set(Memory())
    try:
        yield
    finally:
        _memory.reset(token)


def run(pipe: Any, arguments: Mapping[str, Any], stream: Stream | None = None) -> tuple[Stream, str | None]:
    """Call the pipeline on a pretended device: (what its loop did, why it broke off if it did).

    arguments  of the call; tensors among them are moved to the device before
    """
    stream = stream or Stream()
    memory = _memory.get() or Memory()
    pretend = Pretend(stream, memory.fake)
    copied = copy_of(pipe, stream, DEVICE)
    for name in (*_DENOISERS, "controlnet"):
        model = getattr(copied, name, None)
        if isinstance(model, torch.nn.Module):
            copied.__dict__[name] = _listening(model, memory, pretend, stream, counts=name in _DENOISERS)
    moved = tree_map_only(torch.Tensor, pretend.tensor, dict(arguments))
    with pretend, torch.no_grad():
        try:
            copied(**moved)
        except Exception as error:
            if not stream.started:
                raise
            if not stream.finished:  # what follows the loop (decoding, reports) may fail
                return stream, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return stream, None


def copy_of(pipe: Any, stream: Stream, device: torch.device | None) -> Any:
    """The pipeline again, under the same policy and options if it is guarded; the stream is open while its progress bar is.

    device  where it believes to be; None: where it is
    """
    guard = Guard.of(pipe)
    base = type(pipe).__dict__.get("_fastguard_stock", type(pipe))

    @contextmanager
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with base.progress_bar(self, *args, **kwargs) as bar:
            stream.open = stream.started = True
            try:
                yield bar
                stream.finished = True
            finally:
                stream.open = False

    namespace: dict[str, Any] = {"progress_bar": progress_bar, "__module__": base.__module__}
    if device is not None:
        namespace["device"] = namespace["_execution_device"] = property(lambda self: device)
    copied = object.__new__(type(base)(base.__name__, (base,), namespace))
    copied.__dict__.update({name: value for name, value in vars(pipe).items() if guard is None or value is not guard})
    own = {"scheduler": copy.copy(pipe.scheduler), "_progress_bar_config": {"disable": True}, "_all_hooks": []}
    copied.__dict__.update(own)
    if guard is not None:
        options, real = guard.options, dict[str, Any]()
        if device is None:  # one that is not there cannot be compiled for, nor an attention kernel tried on it
            real = {"attention_backend": options.attention_backend, "compile": options.compile or False}
        enable(copied, guard.policy, unguided=guard.unguided, capture=options.capture, **real)
    return copied


@contextmanager
def counted(pipe: Any, stream: Stream) -> Iterator[None]:
    """Inside, the calls of the pipeline's denoiser are the stream's."""
    denoiser = next(getattr(pipe, name) for name in _DENOISERS if getattr(pipe, name, None) is not None)
    with denoiser.register_forward_pre_hook(stream.enter), denoiser.register_forward_hook(stream.leave):
        yield


def _listening(model: torch.nn.Module, memory: Memory, pretend: Pretend, stream: Stream, *, counts: bool) -> Any:
    """A fake copy of the model, whose forward runs once for each kind of arguments; counts: its calls are rows of the stream."""
    if model not in memory.models:
        memory.models[model] = pretend.module(model)
    copied = copy.copy(memory.models[model])
    forward = copied.forward

    @functools.wraps(forward)
    def listening(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Labelled, pretend.fake, (args, kwargs))
        key = model, repr(tree_map_only(torch.Tensor, _kind, (args, kwargs)))
        stream.enter()
        try:
            if key in memory.results:
                result, ops = memory.results[key]
                stream.ops += [replace(op, row=stream.row) for op in ops]
            else:
                before = len(stream.ops)
                result = forward(*args, **kwargs)
                memory.results[key] = result, stream.ops[before:]
        finally:
            stream.leave(counts=counts)
        return tree_map_only(torch.Tensor, pretend.drawn, result)

    copied.forward = listening
    return copied


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def example_arguments(pipe: Any) -> dict[str, Any]:
    """One prompt's embeddings (zeros) of the width that a text-to-image pipeline's denoiser wants; {} if it is another kind."""
    denoiser: Any = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    config = denoiser.config
    vectors: dict[str, tuple[int, ...]] = {}
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        vectors["prompt_embeds"] = (77, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":
            times = 6 * config.addition_time_embed_dim
            vectors["pooled_prompt_embeds"] = (config.projection_class_embeddings_input_dim - times,)
    elif isinstance(denoiser, diffusers.SD3Transformer2DModel):
        vectors["prompt_embeds"] = (77, config.joint_attention_dim)
        vectors["pooled_prompt_embeds"] = (config.pooled_projection_dim,)
    elif isinstance(denoiser, diffusers.PixArtTransformer2DModel):
        vectors["prompt_embeds"] = (120, config.caption_channels)
        vectors["prompt_attention_mask"] = (120,)
    given = {name: torch.zeros(1, *shape, dtype=denoiser.dtype) for name, shape in vectors.items()}
    return {**given, **{f"negative_{name}": value for name, value in given.items()}}
