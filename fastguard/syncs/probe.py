"""Run a pipeline's own call on a device that is not there (or on a GPU), with a `Stream` listening to its denoising loop.

The call runs on a copy of the pipeline object. Only the denoiser (and a ControlNet) is put on the device, as a fake copy that costs
no memory; its forward is run once for each kind of arguments. The loop is what runs inside the pipeline's progress bar: all of it,
from before the first `scheduler.scale_model_input` to after the last `scheduler.step`.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch.utils._pytree import tree_map_only

from fastguard.capture.graphs import error_text
from fastguard.pipelines.guard import Guard, enable
from fastguard.syncs.pretend import DEVICE, Labelled, Pretend
from fastguard.syncs.stream import Op, Stream

DENOISERS = ("unet", "transformer", "transformer_2")


def run(pipe: Any, arguments: Mapping[str, Any], stream: Stream) -> None:
    """Call the pipeline on a pretended device, to which tensors among the arguments are moved before."""
    pretend, copied = Pretend(stream), copy_of(pipe, stream, DEVICE)
    for name in (*DENOISERS, "controlnet"):
        model = getattr(copied, name, None)
        if isinstance(model, torch.nn.Module):
            copied.__dict__[name] = listening(model, pretend, counts=name in DENOISERS)
    moved = tree_map_only(torch.Tensor, lambda tensor: Labelled(tensor.detach()), dict(arguments))
    with pretend, torch.no_grad():
        try:
            copied(**moved)
        except Exception:  # in the loop, which notes it, or in what follows it (decoding, reports)
            if not stream.begun:
                raise


def copy_of(pipe: Any, stream: Stream, device: torch.device | None) -> Any:
    """The pipeline again, under the same policy and options if it is guarded; the stream is open while its progress bar is.

    device  where it believes to be; None: where it is
    """
    guard, copied = Guard.of(pipe), copy.copy(pipe)  # a copy is of the stock class and without a guard
    base: Any = type(copied)

    @contextmanager
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with base.progress_bar(self, *args, **kwargs) as bar:
            stream.open = stream.begun = True
            try:
                yield bar
            except Exception as error:
                stream.broke_off = error_text(error)
                raise
            finally:
                stream.open = False

    namespace: dict[str, Any] = {"progress_bar": progress_bar, "__module__": base.__module__}
    if device is not None:
        namespace["device"] = namespace["_execution_device"] = property(lambda self: device)
    copied.__class__ = type(base)(base.__name__, (base,), namespace)
    copied.__dict__.update(scheduler=copy.copy(pipe.scheduler), _progress_bar_config={"disable": True}, _all_hooks=[])
    if guard is not None:
        options = {**vars(guard.options), "compile": guard.options.compile or False}
        if device is not None:  # one that is not there cannot be compiled for, nor an attention kernel tried on it
            options |= {"attention_backend": None, "compile": False}
        own = enable(copied, guard.policy, unguided=guard.unguided, family="probe", **options)
        own.family, own.probed = guard.family, guard.probed
    return copied


def listening(model: torch.nn.Module, pretend: Pretend, *, counts: bool) -> Any:
    """A fake copy of the model, whose forward runs once for each kind of arguments; counts: its calls are rows of the device's stream."""
    copied = pretend.module(model)
    forward = copied.forward
    known: dict[str, tuple[Any, list[Op]]] = {}

    @functools.wraps(forward)
    def known_or_run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Labelled, pretend.fake, (args, kwargs))
        kinds = tree_map_only(torch.Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype, t.device), (args, kwargs))
        key = repr(kinds)
        stream = pretend.stream
        stream.enter()
        try:
            if key in known:
                result, ops = known[key]
                stream.ops += [replace(op, row=stream.row) for op in ops]
            else:
                before = len(stream.ops)
                result = forward(*args, **kwargs)
                known[key] = result, stream.ops[before:]
        finally:
            stream.leave(counts=counts)
        return tree_map_only(torch.Tensor, pretend.drawn, result)

    copied.forward = known_or_run
    return copied


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
